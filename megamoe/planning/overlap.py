"""What of reducing gradients the backward pass hides, bucket by bucket.

Before DeepSpeed reduces a bucket on its own stream, the compute stream waits for the reduction before (`average_tensor`
in stage_1_and_2.py; DeepSpeed issue 8364). So a reduction, which begins when a gradient has come that does not fit,
hides behind those that come until the next one begins, and the last, which has the embedding, behind nothing. What is
reduced once (`training/reduce_once.py`) goes by flat groups, each when its last gradient has come; backward waits for
none, and the next begins when the one before has ended.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from megamoe.planning.buckets import Ledger
from megamoe.planning.footprint import reduction_of, replay_backward
from megamoe.planning.model_trace import END, ModelTrace
from megamoe.planning.sharding import Group, Setup


class Bucket(NamedTuple):
    """Gradients that are reduced together."""

    share: float  # of the backward pass, since the bucket before
    elements: Counter[bool]  # of shared weights (False) and of experts (True)


def buckets(setup: Setup, groups: list[Group], trace: ModelTrace) -> list[Bucket]:
    """Those of the last backward pass of a step, of which every block takes an equal part, and in it every gradient one
    by its size."""
    ledger, shares = Ledger(Counter()), dict[str, float]()
    sizes = {name: size for group in groups for name, size in group.sizes.items()}
    for prefix, block in trace.blocks.items():
        names = [f"{prefix}.{one.name}" for one in block.events["backward"] if one.name != END]
        whole = len(trace.blocks) * sum(sizes[name] for name in names)
        shares |= {name: sizes[name] / whole for name in names}
    reduction = reduction_of(setup, groups, 0, ledger)
    found, share = list[Bucket](), 0.0

    def note() -> None:
        nonlocal share
        for elements in reduction.reduced[len(found) :]:
            found.append(Bucket(share, elements))
            share = 0.0

    def ready(name: str) -> None:
        nonlocal share
        share += shares.get(name, 0.0)
        reduction.ready(name)
        note()

    reduction.start(first=True, boundary=True)
    replay_backward(trace, ledger, ready)
    reduction.finish()
    note()
    return found


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
