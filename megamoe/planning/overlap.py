"""What of reducing gradients the backward pass hides, bucket by bucket.

Before DeepSpeed reduces a bucket on its own stream, the compute stream waits for the reduction before (`average_tensor`
in stage_1_and_2.py; DeepSpeed issue 8364). So a reduction hides behind the gradients that fill the next bucket, and the
last, which has the embedding, behind nothing. What is reduced once (`training/reduce_once.py`) goes by flat groups,
each when its last gradient has come; backward waits for none, and the next begins when the one before has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megamoe.planning.model_trace import BLOCK, END, ModelTrace
from megamoe.planning.sharding import Group, Setup


class Bucket(NamedTuple):
    """Gradients that are reduced together."""

    share: float  # of the backward pass, since the bucket before
    elements: Counter[bool]  # of shared weights (False) and of experts (True)


def buckets(setup: Setup, groups: list[Group], trace: ModelTrace) -> list[Bucket]:
    """Those of one backward pass, of which every block takes an equal part."""
    group_of = {name: number for number, group in enumerate(groups) for name in group.sizes}
    order = list(_gradients(trace, {name: size for group in groups for name, size in group.sizes.items()}))
    last = {group_of[name]: name for name, _ in order}  # of each group
    found = []
    share, elements = 0.0, Counter[bool]()
    for name, part in order:
        group = groups[group_of[name]]
        if elements and not setup.reduces_once and elements.total() + group.sizes[name] > setup.bucket:
            found.append(Bucket(share, elements))
            share, elements = 0.0, Counter()
        share += part
        if not setup.reduces_once:
            elements[group.expert] += group.sizes[name]
        elif name == last[group_of[name]]:
            found.append(Bucket(share, Counter({group.expert: sum(group.sizes.values())})))
            share = 0.0
    return [*found, Bucket(share, elements)]


def _gradients(trace: ModelTrace, sizes: dict[str, int]) -> Iterator[tuple[str, float]]:
    """Names in the order of backward, with the share of the pass that each takes; within a block, by its size."""
    blocks = reversed(list(trace.blocks.items()))
    for event in trace.around.events["backward"]:
        if event.name == BLOCK:
            prefix, block = next(blocks)
            names = [f"{prefix}.{one.name}" for one in block.events["backward"] if one.name != END]
            whole = len(trace.blocks) * sum(sizes[name] for name in names)
            yield from ((name, sizes[name] / whole) for name in names)
        elif event.name != END:
            yield event.name, 0.0


def seconds_not_hidden(found: list[Bucket], backward: float, reductions: dict[bool, float], waits: bool) -> float:
    """By how much the reductions prolong a backward pass.

    Args:
        backward: seconds of the pass.
        reductions: seconds of reducing the gradients of all shared weights (False), and those of all experts (True).
        waits: whether backward waits for each before the next begins.
    """
    whole = sum((bucket.elements for bucket in found), Counter[bool]())
    now = reduced = 0.0
    for bucket in found:
        now += bucket.share * backward
        if waits:
            now = max(now, reduced)
        parts = (reductions[expert] * size / whole[expert] for expert, size in bucket.elements.items())
        reduced = max(now, reduced) + sum(parts)
    return reduced - backward
