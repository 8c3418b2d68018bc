"""What of reducing gradients the backward pass hides, bucket by bucket.

Before DeepSpeed reduces a bucket on its own stream, the compute stream waits for the reduction before (`average_tensor`
in stage_1_and_2.py; DeepSpeed issue 8364). So a reduction hides behind the gradients that fill the next bucket, and the
last, which has the embedding, behind nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megamoe.planning.model_trace import BLOCK, END, ModelTrace
from megamoe.planning.sharding import Group, Setup


class Bucket(NamedTuple):
    """Gradients that are reduced together, which is where one comes that does not fit."""

    share: float  # of the backward pass, while it fills
    elements: Counter[bool]  # of shared weights (False) and of experts (True)


def buckets(setup: Setup, groups: list[Group], trace: ModelTrace) -> list[Bucket]:
    """Those of one backward pass, of which every block takes an equal part."""
    of_name = {name: (size, group.expert) for group in groups for name, size in group.sizes.items()}
    found = []
    share, elements = 0.0, Counter[bool]()
    for name, part in _gradients(trace, {name: size for name, (size, _) in of_name.items()}):
        size, expert = of_name[name]
        if elements and elements.total() + size > setup.bucket:
            found.append(Bucket(share, elements))
            share, elements = 0.0, Counter()
        share += part
        elements[expert] += size
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


def seconds_not_hidden(found: list[Bucket], backward: float, reductions: dict[bool, float]) -> float:
    """By how much the reductions prolong a backward pass.

    Args:
        backward: seconds of the pass.
        reductions: seconds of reducing the gradients of all shared weights (False), and those of all experts (True).
    """
    whole = sum((bucket.elements for bucket in found), Counter[bool]())
    now = reduced = 0.0
    for bucket in found:
        now = max(now + bucket.share * backward, reduced)
        parts = (reductions[expert] * size / whole[expert] for expert, size in bucket.elements.items())
        reduced = now + sum(parts)
    return max(now, reduced) - backward
