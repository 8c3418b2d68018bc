"""Bytes on their way through DeepSpeed's reduction of gradients and, with an offloaded optimizer, on to the host.

Order and sizes are those of `deepspeed/runtime/zero/stage_1_and_2.py` (0.19), whose functions the comments name.
"""

from __future__ import annotations

from collections import Counter

from megamoe.planning.sharding import Group, Setup, elements_touched


class Ledger:
    """What is held, by kind, and what was held at the peak since the last `restart`."""

    def __init__(self, held: Counter[str]) -> None:
        self.held = Counter(held)
        self.peak = Counter(held)

    def restart(self) -> None:
        self.peak = Counter(self.held)

    def allocate(self, kind: str, size: int) -> None:
        self.held[kind] += size
        if self.held.total() > self.peak.total():
            self.peak = Counter(self.held)

    def free(self, kind: str, size: int) -> None:
        self.held[kind] -= size
        assert self.held[kind] >= 0, kind

    def move(self, before: Counter[str], after: Counter[str]) -> None:
        """Of each kind so many bytes, where there were those `before`."""
        for kind in before | after:
            self.held[kind] += after[kind] - before[kind]
        if self.held.total() > self.peak.total():
            self.peak = Counter(self.held)

    def transient(self, kind: str, size: int) -> None:
        """Allocate and free."""
        self.allocate(kind, size)
        self.free(kind, size)


class Reduction:
    """DeepSpeed's buckets: gradients are copied into one as they come, which is reduced when the next would not fit."""

    def __init__(self, setup: Setup, groups: list[Group], rank: int, ledger: Ledger):
        self.setup, self.groups, self.ledger = setup, groups, ledger
        self.index = [group.index(setup.topology(rank)) for group in groups]
        self.group_of = {name: number for number, group in enumerate(groups) for name in group.sizes}
        self.owned = {
            name: group.owners(name).get(index, 0)
            for group, index in zip(groups, self.index, strict=True)
            for name in group.sizes
        }
        self.boundary = False  # whether this is the last backward pass of a step
        self.is_first = True  # whether it is the first one
        self.has_begun = False  # whether a gradient of it has come
        self.sums = False  # whether gradients are added to those of the pass before
        self.partitions: dict[int, int] = {}  # bytes of what this rank owns of sums, apart from gradients, by group
        self.whole = setup.weight_bytes * elements_touched(setup, groups, rank)
        self.kept = 0  # bytes of whole gradients, of this backward pass
        self.kept_before = 0  # and of those before it
        self.reduced: list[Counter[bool]] = []  # of each reduction, elements of shared weights (False) and of experts
        self.waiting: list[str] = []  # parameters whose gradients are in the bucket
        self.filled = 0  # elements of the bucket
        self.left = 0  # bytes of gradients that were reduced where they are, and are still referred to
        self.in_reduction = 0  # and of one that is, until the next is reduced

    def size(self, name: str) -> int:
        return self.groups[self.group_of[name]].sizes[name]

    def start(self, first: bool, boundary: bool) -> None:
        """A backward pass begins."""
        self.is_first, self.boundary, self.has_begun = first, boundary, False
        self.sums = not first and self.setup.zero_stage == 1  # and sums whole gradients

    def ready(self, name: str) -> None:
        """The gradient of a parameter has come."""
        setup = self.setup
        keeps_buckets = setup.zero_stage == 1 and not self.is_first  # empty, until it reduces
        if not self.has_begun and not keeps_buckets:
            self.ledger.allocate("reduction buckets", (1 + setup.overlap) * setup.bucket * setup.weight_bytes)
        self.has_begun = True
        size = self.size(name) * setup.weight_bytes
        self.ledger.allocate("gradients", size)
        if self.sums:
            self.ledger.free("gradients", size)
        if setup.zero_stage == 2 or (setup.overlap and self.boundary):
            self.reduce_later(name)

    def reduce_later(self, name: str) -> None:
        size = self.size(name)
        if self.filled + size > self.setup.bucket:
            self.flush()
        if self.setup.offload and size > self.setup.bucket:  # cloned (reduce_independent_p_g_buckets_and_remove_grads)
            self.ledger.transient("gradients", size * self.setup.weight_bytes)
        self.waiting.append(name)
        self.filled += size
        if size <= self.setup.bucket:  # now in the bucket; a larger one is reduced where it is
            self.ledger.free("gradients", size * self.setup.weight_bytes)

    def flush(self) -> None:
        """Reduce what waits, and keep what this rank owns of it."""
        setup, ledger = self.setup, self.ledger
        # All slices are laid out first, which makes the partitions, and then reduced group by group (average_tensor).
        experts = {name for name in self.waiting if self.groups[self.group_of[name]].expert}
        for ranks, slices in (
            (setup.world_size, self.slices([name for name in self.waiting if name not in experts])),
            (setup.topology().replicas, self.slices([name for name in self.waiting if name in experts])),
        ):
            if setup.reduces(ranks):
                ledger.transient("reduction temporaries", self.copies(slices))
        self.end_reduction()
        elements = Counter[bool]()
        for name in self.waiting:
            elements[name in experts] += self.size(name)
            if setup.offload:
                self.send_to_host(name)
            if self.size(name) > setup.bucket:
                self.leave(name)
            if not setup.offload and not self.setup.sums_apart and not self.kept and self.owned[name]:
                # One buffer for all, at the first parameter of which this rank owns a part (copy_grads_in_partition).
                self.kept = self.whole
                ledger.allocate("gradients owned", self.kept)
        self.reduced += [elements] * bool(self.waiting)
        self.waiting, self.filled = [], 0

    def leave(self, name: str) -> None:
        """A gradient too large for a bucket is reduced. Where it is neither cleared nor replaced by a copy, it stays to
        the end of backward (reduce_ipg_grads, copy_grads_in_partition); else, with overlap, until it is reduced
        (`GivenNormOptimizer.average_tensor`)."""
        setup, size = self.setup, self.size(name) * self.setup.weight_bytes
        if setup.zero_stage == 1:
            stays = not self.owned[name]
        else:
            stays = self.owned[name] > 0 and (not self.boundary if setup.offload else setup.sums_apart)
        if stays:
            self.left += size
        else:
            self.in_reduction = size
            if setup.offload or not setup.overlap:
                self.end_reduction()

    def end_reduction(self) -> None:
        self.ledger.free("gradients", self.in_reduction)
        self.in_reduction = 0

    def send_to_host(self, name: str) -> None:
        """Copy what this rank owns of a gradient into the host's fp32 gradients (copy_grads_in_partition)."""
        if self.boundary:
            self.ledger.transient("temporaries of the offload", 8 * self.owned[name])  # in fp64, for the norm
            if self.setup.sum_bytes < 4:
                self.ledger.transient("temporaries of the offload", 4 * self.owned[name])

    def slices(self, names: list[str]) -> list[tuple[int, int, bool]]:
        """(owner, elements, added to this rank's fp32 partition) of what one all-reduce takes, neighbours of one owner
        joined where they can be (average_tensor)."""
        slices: list[tuple[int, int, bool]] = []
        for name in names:
            number = self.group_of[name]
            for owner, size in self.groups[number].owners(name).items():
                mine = self.setup.sums_apart and owner == self.index[number]
                if mine and number not in self.partitions:
                    self.partitions[number] = self.groups[number].partition * self.setup.sum_bytes
                    self.ledger.allocate("gradient partition", self.partitions[number])
                if slices and not mine and slices[-1][0] == owner and not slices[-1][2]:
                    slices[-1] = owner, slices[-1][1] + size, False
                else:
                    slices.append((owner, size, mine))
        return slices

    def copies(self, slices: list[tuple[int, int, bool]]) -> int:
        """Most bytes at once of the flat copy that is reduced, of its form on the wire, and of a slice in fp32."""
        setup, most = self.setup, 0
        pieces = size = added = 0
        for number, (_, elements, mine) in enumerate(slices, start=1):
            pieces, size = pieces + 1, size + elements
            added = max(added, elements * setup.sum_bytes * mine * (setup.communication_bytes != setup.sum_bytes))
            if size > setup.bucket or number == len(slices):
                flat = size * setup.weight_bytes if pieces > 1 else 0  # one piece alone needs no copy
                wire = size * setup.communication_bytes if setup.communication_bytes != setup.weight_bytes else 0
                most = max(most, flat + wire + added)
                pieces = size = added = 0
        return most

    def finish(self) -> None:
        """Backward is over."""
        setup, ledger = self.setup, self.ledger
        if setup.zero_stage == 1 and not self.boundary:
            return
        if setup.zero_stage == 1 and not setup.overlap:
            for group in self.groups:
                for name in group.sizes:
                    self.reduce_later(name)
        self.flush()
        self.end_reduction()
        ledger.free("reduction buckets", ledger.held["reduction buckets"])
        ledger.free("gradients", self.left)
        self.left = 0
        if self.kept_before:
            ledger.free("gradients owned", self.kept)  # added to those of the passes before
        self.kept_before, self.kept = self.kept_before or self.kept, 0
