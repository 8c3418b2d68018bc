"""Bytes of gradients that are summed on each rank and reduced once per step, as in `training/reduce_once.py`."""

from __future__ import annotations

from collections import Counter

from megamoe.planning.buckets import Ledger, Reduction
from megamoe.planning.sharding import Group, Setup

SUMS, COPIES = "gradient sums", "reduction temporaries"


class ReduceOnce(Reduction):
    """In the place of DeepSpeed's buckets."""

    def __init__(self, setup: Setup, groups: list[Group], rank: int, ledger: Ledger):
        super().__init__(setup, groups, rank, ledger)
        self.bytes_of_sums = setup.sum_bytes * sum(group.partition * group.ranks for group in groups)
        self.awaited = [len(group.sizes) for group in groups]  # gradients, in the last backward pass of a step

    def ready(self, name: str) -> None:
        """The gradient of a parameter has come."""
        ledger, number = self.ledger, self.group_of[name]
        size = self.size(name) * self.setup.weight_bytes
        ledger.allocate("gradients", size)
        if not ledger.held[SUMS]:
            ledger.allocate(SUMS, self.bytes_of_sums)
        ledger.free("gradients", size)
        self.awaited[number] -= self.boundary
        if self.setup.overlap and not self.awaited[number]:
            self.reduce(number)

    def reduce(self, number: int) -> None:
        """A group is reduced."""
        setup, group, ledger = self.setup, self.groups[number], self.ledger
        owned = group.partition * (setup.sum_bytes if group.ranks == 1 else setup.communication_bytes)
        if group.ranks == 1:  # the sum is the share
            ledger.free(SUMS, owned)
        elif setup.communication_bytes != setup.sum_bytes or setup.on_cpu:  # gloo reduces a copy
            ledger.allocate(COPIES, group.ranks * owned)
        self.partitions[number] = owned
        self.reduced.append(Counter({group.expert: sum(group.sizes.values())}))
        ledger.allocate("gradient partition", owned)

    def finish(self) -> None:
        """Backward is over."""
        if self.boundary:
            for number in set(range(len(self.groups))) - self.partitions.keys():
                self.reduce(number)
            for kind in (SUMS, COPIES):
                self.ledger.free(kind, self.ledger.held[kind])
