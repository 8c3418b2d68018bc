"""What accelerators can do, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass, field

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
WITHOUT_BF16 = ("V100",)  # its 16-bit figure is that of fp16


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
    host: float  # bytes/s to the host's memory
    host_memory_rate: float  # bytes/s of the host's memory, its own share
    capability: tuple[int, int] | None = field(default=None, kw_only=True)  # of CUDA
    multiprocessors: int = field(default=0, kw_only=True)  # each takes a tile of a GEMM at a time; 0 on CPU

    def flops(self, weight_bytes: int) -> float:
        """Peak FLOP/s for weights of 2 or 4 bytes."""
        return self.half_flops if weight_bytes == 2 else self.single_flops

    def mfu_peak(self, weight_bytes: int) -> float:
        """What MFU is the share of: on a CPU the faster of both, as in `Precision.mfu_peak`."""
        return self.flops(weight_bytes) if self.multiprocessors else max(self.half_flops, self.single_flops)


# Data sheets of the SXM boards (memory, memory bandwidth, half of the "bidirectional" figures of NVLink and of PCIe, of
# generation 4 for A100 and 5 for the others) and of DGX A100, H100, H200 and B200: one adapter of 200 Gb/s per GPU in
# the first, of 400 Gb/s in the others; of two processors with 8 memory channels each (DDR4-3200, DDR5-4800, DDR5-4800,
# DDR5-5600) an eighth for each GPU. The host's rates are assumed to be reached by all GPUs of a node at once.
# CUDA's capabilities: https://developer.nvidia.com/cuda-gpus.
DEVICES = {
    name.lower(): Device(name, *KNOWN_PEAKS[name], *rates, capability=capability, multiprocessors=multiprocessors)
    for name, capability, multiprocessors, rates in (
        ("A100", (8, 0), 108, (80 * 2**30, 2.039e12, 300e9, 25e9, 32e9, 51.2e9)),
        ("H100", (9, 0), 132, (79.6 * 2**30, 3.35e12, 450e9, 50e9, 64e9, 76.8e9)),
        ("H200", (9, 0), 132, (140.4 * 2**30, 4.8e12, 450e9, 50e9, 64e9, 76.8e9)),
        ("B200", (10, 0), 148, (179 * 2**30, 8e12, 900e9, 50e9, 64e9, 89.6e9)),
    )
}
