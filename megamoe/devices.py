"""What accelerators can do, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

# Dense peak of one accelerator in FLOP/s at (16-bit, fp32 as torch runs it by default), from the makers' data sheets.
KNOWN_PEAKS = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10G": (70e12, 35e12),
    "V100": (125e12, 15.7e12),
}


@dataclass(frozen=True)
class Device:
    """One accelerator and its links, each way. Rates count by thousands, as data sheets do."""

    name: str
    half_flops: float  # FLOP/s
    single_flops: float
    memory: float  # bytes, as the driver reports them
    memory_rate: float  # bytes/s
    inside: float  # bytes/s to the others of its node
    between: float  # bytes/s to other nodes, its own share of the node's network

    def flops(self, weight_bytes: int) -> float:
        """Peak FLOP/s for weights of 2 or 4 bytes."""
        return self.half_flops if weight_bytes == 2 else self.single_flops


# Data sheets of the SXM boards (memory, memory bandwidth, half of NVLink's "bidirectional" figure) and of DGX A100,
# H100, H200 and B200 (one adapter of 200 Gb/s per GPU in the first, of 400 Gb/s in the others).
DEVICES = {
    name.lower(): Device(name, *KNOWN_PEAKS[name], memory, memory_rate, inside, between)
    for name, memory, memory_rate, inside, between in (
        ("A100", 80 * 2**30, 2.039e12, 300e9, 25e9),
        ("H100", 79.6 * 2**30, 3.35e12, 450e9, 50e9),
        ("H200", 140.4 * 2**30, 4.8e12, 450e9, 50e9),
        ("B200", 179 * 2**30, 8e12, 900e9, 50e9),
    )
}
