"""What this device can do: of its data sheet, or measured."""

from __future__ import annotations

import math
import re
import resource
import time
from dataclasses import dataclass

import torch

from megamoe.utils.data_sheets import KNOWN_PEAKS, WITHOUT_BF16


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
