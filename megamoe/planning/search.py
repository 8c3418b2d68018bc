"""The split of a step that is predicted best: micro-batch, accumulation, `ep_size`, `recompute_blocks`, `recompute`,
ZeRO stage."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from megamoe.config.run import Recompute
from megamoe.model.topology import ExpertTopology
from megamoe.planning.footprint import footprint
from megamoe.planning.rates import Rates
from megamoe.planning.sharding import Setup
from megamoe.planning.step_time import StepTime, step_time
from megamoe.utils.data_sheets import Device

MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def kept_free(setup: Setup) -> float:
    """Share of a device's memory that is left to its context, the communication library and the allocator's fragments:
    on CPU the heap's gaps, as docs/results/scale.md has measured them."""
    return 0.25 if setup.on_cpu else 0.1


@dataclass(frozen=True)
class Split:
    """A split that fits."""

    setup: Setup
    memory: int  # bytes at the peak
    time: StepTime


def best_splits(
    setup: Setup, device: Device, gpus_per_node: int, rates: Rates, samples: int | None = None
) -> list[Split]:
    """Every split that fits, with the lowest `recompute_blocks` that does, most tokens/s first.

    Args:
        samples: of a step over all ranks, which accumulation keeps; None keeps the accumulation of `setup`.
    """
    found = []
    stages = (setup.zero_stage,) if setup.offload else (1, 2)
    for ep_size, stage in product(_ep_sizes(setup), stages):
        for micro_batch, accumulation in _batches(setup, samples):
            if accumulation == 1 and stage < setup.zero_stage:
                continue  # more memory for nothing that is saved
            split = replace(setup, ep_size=ep_size, micro_batch=micro_batch, accumulation=accumulation)
            split = replace(split, zero_stage=stage)
            fitting = [
                replace(split, recompute=how, recompute_blocks=blocks)
                for how in get_args(Recompute)
                if (blocks := _fewest_recomputed(replace(split, recompute=how), device)) is not None
            ]
            if not fitting:
                break  # nor do more samples fit
            for one in fitting if fitting[0].recompute_blocks else fitting[:1]:
                found.append(Split(one, _memory(one), step_time(one, device, gpus_per_node, rates)))
    return sorted(found, key=lambda split: split.time.tokens_per_second, reverse=True)


def largest_micro_batch(setup: Setup, device: Device) -> int:
    """The largest that fits with all else as it is and leaves `kept_free`: 0 if none does, `MICRO_BATCHES[-1]` if more
    may."""
    limit, powers = device.memory * (1 - kept_free(setup)), [size for size in MICRO_BATCHES if size.bit_count() == 1]

    def is_over(micro_batch: int) -> bool:
        return _memory(replace(setup, micro_batch=micro_batch)) > limit

    over = next((size for size in powers if is_over(size)), None)
    if over is None:
        return powers[-1]
    return over // 2 + bisect_left(range(over // 2 + 1, over), True, key=is_over)


def _ep_sizes(setup: Setup) -> Iterator[int]:
    experts, ranks = setup.model.num_local_experts, setup.world_size
    return (size for size in range(1, experts + 1) if not ExpertTopology.problems(size, experts, ranks, ""))


def _batches(setup: Setup, samples: int | None) -> Iterator[tuple[int, int]]:
    """(micro-batch, accumulation)."""
    for micro_batch in MICRO_BATCHES:
        if samples is None:
            yield micro_batch, setup.accumulation
        elif samples % (micro_batch * setup.world_size) == 0:
            yield micro_batch, samples // (micro_batch * setup.world_size)


def _fewest_recomputed(setup: Setup, device: Device) -> int | None:
    """Blocks to recompute so that the step fits; None if it does not even with all of them."""
    most, limit = setup.model.num_hidden_layers, device.memory * (1 - kept_free(setup))

    def fits(blocks: int) -> bool:
        return _memory(replace(setup, recompute_blocks=blocks)) <= limit

    if fits(0):
        return 0
    blocks = bisect_left(range(most), True, 1, key=fits)
    return blocks if blocks < most or fits(most) else None


def _memory(setup: Setup) -> int:
    # From the third micro-batch on they are all alike.
    return footprint(replace(setup, accumulation=min(setup.accumulation, 3))).peak.total()
