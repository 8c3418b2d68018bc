"""What devices can do: data sheets of accelerators, and rates measured here."""

from __future__ import annotations

import math
import re
import resource
import time
from dataclasses import dataclass, field

import torch

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


@dataclass(frozen=True)
class Peak:
    """What MFU is the share of."""

    flops: float  # FLOP/s of one device
    is_measured: bool  # there is no data sheet for it here

    def __str__(self) -> str:
        source = "measured, of square GEMMs" if self.is_measured else "of the data sheet"
        return f"{describe_flops(self.flops)} per rank, {source}"


def describe_flops(rate: float) -> str:
    """A rate in FLOP/s with its unit."""
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """Peak FLOP/s of `device` for `dtype`: from the data sheet where the name is known, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, single) in KNOWN_PEAKS.items():
            if re.search(rf"\b{known}(?!\d)", name) and not (known in WITHOUT_BF16 and dtype == torch.bfloat16):
                return Peak(single if dtype == torch.float32 else half, is_measured=False)
    return Peak(measured_flops(device, dtype), is_measured=True)


# Sides of the square GEMMs that are measured: twice the size again and again while there is time. The largest
# takes under 1 GiB in fp32.
SMALLEST_SQUARE, LARGEST_SQUARE, LARGEST_SQUARE_ON_CPU = 128, 8192, 1024
MEASURED_SECONDS = 0.3
ROUNDS = 8


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square GEMMs on `device`, with the threads that this process has; 0 where it computes none.
    A processor without bf16 instructions needs seconds for a large one, hence the limit of time."""
    size, best, on_cpu = SMALLEST_SQUARE, 0.0, device.type == "cpu"
    try:
        _gemm_seconds(_square(size, device, dtype))  # loads libraries, builds a kernel
        until = time.perf_counter() + MEASURED_SECONDS
        while size <= (LARGEST_SQUARE_ON_CPU if on_cpu else LARGEST_SQUARE):
            seconds, a = math.inf, _square(size, device, dtype)
            if not on_cpu:
                until += _gemm_seconds(a)  # loads this size's kernel
            for _ in range(ROUNDS):
                seconds = min(seconds, _gemm_seconds(a))
                best = max(best, 2 * size**3 / seconds)
                if time.perf_counter() > until:
                    return best
            if time.perf_counter() + 2**3 * seconds > until:  # what a GEMM of twice the size takes
                return best
            size *= 2
    except RuntimeError:  # out of memory, or no kernel for this dtype
        pass
    return best


def _square(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator(device).manual_seed(0)  # torch's own goes on as if nothing had been drawn
    return torch.randn(size, size, device=device, generator=draw).to(dtype)


def _gemm_seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    b = a @ a
    b[-1, -1].item()  # waits for the device
    return time.perf_counter() - start


def measured_bandwidth(device: torch.device, size: int = 2**28, rounds: int = 5) -> float:
    """Bytes read and written per second by the fastest of some copies of `size` bytes on `device`."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on the accelerator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
