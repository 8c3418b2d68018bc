"""What is reached of a device's data sheet, and how long a GEMM of any shape takes. All of it is assumed for GPUs
until one is measured; docs/results/scale.md says what each number rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megamoe.planning.work import Gemm
from megamoe.utils.data_sheets import Device


@dataclass(frozen=True)
class Rates:
    """Shares of a device's rates, and seconds that the host takes."""

    gemms: float  # share of the peak FLOP/s that the largest GEMMs reach
    attention: float  # share of the peak FLOP/s, for heads far wider than ATTENTION_WIDTH
    memory: float  # share of the memory's rate
    links: float  # share of the links' rates
    operator: float  # seconds of the host for each operator
    region: float  # seconds of the host, beyond operators, for each compiled region that it calls
    parameter: float  # seconds of the host, beyond operators, for each gradient that DeepSpeed takes
    wait: float  # seconds from the end of what the host waits for to the device's next operator


GPU = Rates(gemms=0.8, attention=0.45, memory=0.9, links=0.7, operator=6e-6, region=30e-6, parameter=30e-6, wait=20e-6)
# Fitted by tools/dev/benchmark_plan.py, as shares of the rates of a square GEMM and of a copy. An operator's time is
# that of running a small one; DeepSpeed's is in it.
CPU = Rates(gemms=0.75, attention=0.3, memory=1.2, links=0.7, operator=30e-6, region=30e-6, parameter=0.0, wait=0.0)

# A multiprocessor computes a tile of the result at a time, in steps along the inner dimension. Rows and columns of the
# tiles that libraries choose from, and how often they split the inner dimension of a GEMM with few tiles.
TILES = ((128, 256), (256, 128), (128, 128))
SPLITS = (1, 2, 4, 8)
# torch's grouped GEMM on sm_9x has one of two tiles, by the size of a group (aten/src/ATen/native/cuda/GroupMM.cu).
GROUPED_TILE, SMALL_GROUPED_TILE, SMALL_GROUP = (128, 256), (64, 128), 128
PROLOGUE = 192  # steps along the inner dimension that filling and draining a tile's pipeline take: three stages of 64
KERNEL = 2e-6  # seconds that a kernel takes at the least
# Width of a head at which a score's exponential, which no matrix unit computes, takes as long as its GEMMs.
ATTENTION_WIDTH = 64

# On CPU, operands are read and written into another layout, and a core does not compute while it waits for memory; each
# group is a call of its own, of 7 us where an operator takes 30.
PACKING, GROUP = 3, 0.25


def gemm_seconds(gemm: Gemm, device: Device, rates: Rates, itemsize: int) -> float:
    """Seconds of a GEMM: on a GPU the longer of its tiles and of its bytes, on CPU both."""
    moved = gemm.bytes(itemsize) / (device.memory_rate * rates.memory)
    peak = device.flops(itemsize) * rates.gemms
    if not device.multiprocessors:
        return gemm.flops / peak + PACKING * moved + GROUP * gemm.groups * rates.operator
    computed = _seconds_of_tiles(gemm, device.multiprocessors, peak / device.multiprocessors)
    return KERNEL + max(moved, computed)


def _seconds_of_tiles(gemm: Gemm, multiprocessors: int, rate: float) -> float:
    """With the best of the tiles that there are.

    Args:
        rate: FLOP/s of a multiprocessor.
    """
    if gemm.groups > 1:
        is_small = min(gemm.rows, gemm.columns) <= SMALL_GROUP
        choices = [(SMALL_GROUPED_TILE if is_small else GROUPED_TILE, 1)]
    else:
        choices = [(tile, split) for tile in TILES for split in SPLITS]
    return min(
        math.ceil(gemm.groups * math.ceil(gemm.rows / high) * math.ceil(gemm.columns / wide) * split
                  / multiprocessors)
        * 2 * high * wide * (gemm.inside / split + PROLOGUE) / rate
        for (high, wide), split in choices
    )  # fmt: skip


def attention_seconds(flops: float, head_dim: int, device: Device, rates: Rates, itemsize: int) -> float:
    """Seconds of attention's scores and sums."""
    reached = rates.attention * head_dim / (head_dim + ATTENTION_WIDTH)
    return flops / (device.flops(itemsize) * reached)
