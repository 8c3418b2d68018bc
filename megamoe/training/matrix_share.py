"""Which matrices of a flat group lie on a rank, as a whole or in part, by arithmetic.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

BATCH = 2**24  # values of the matrices that are multiplied at once, unless one has more

Shape = tuple[int, int]  # (R, C)


def place_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Sort key of the matrices that are no experts', in their flat group: those of one shape are neighbours, to be
    multiplied at once, and the first rank has those of the most FLOPs per value."""
    return -min(shape), *shape


@dataclass(frozen=True)
class Run:
    """Matrices of one shape, one after the other."""

    start: int  # in the flat group
    count: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.count * self.rows * self.columns


class MatrixShare:
    """What a rank has of a flat group of matrices that is split evenly over ranks.

    The end of a share may cut a matrix. It is `tail` on the rank on which it begins. So no rank has more than two
    parts: of a tail of its own, and of one of a rank before.
    """

    def __init__(self, shapes: list[Shape], partition: int, rank: int, ranks: int):
        """
        Args:
            shapes: of the matrices, in their order in the flat group.
            partition: values on each rank, the fill of the last included.
        """
        starts = itertools.accumulate(map(math.prod, shapes), initial=0)
        matrices = [Run(start, 1, *shape) for start, shape in zip(starts, shapes, strict=False)]
        self.start, self.end = rank * partition, (rank + 1) * partition
        self._partition = partition

        def cut_at(place: int) -> Run | None:
            return next((one for one in matrices if one.start < place < one.end), None)

        head, tail = cut_at(self.start), cut_at(self.end)
        self.tail = tail if tail and tail.start >= self.start else None
        home = head.start // partition if head else None
        self.sent = [self._held(head, rank) if other == home else 0 for other in range(ranks)]
        """Values of a matrix that begins on another rank, by rank: they go there to be orthogonalized."""
        self.received = [self._held(self.tail, other) if other > rank else 0 for other in range(ranks)]
        """Values of `tail` on the other ranks."""
        self.is_cut = any(one.start // partition != (one.end - 1) // partition for one in matrices)
        """Whether any matrix of the group is on more than one rank."""
        whole = (one for one in matrices if self.start <= one.start and one.end <= self.end)
        self.whole = list(_batches(whole))

    def _held(self, matrix: Run | None, rank: int) -> int:
        first, last = rank * self._partition, (rank + 1) * self._partition
        return max(min(matrix.end, last) - max(matrix.start, first), 0) if matrix else 0


def _batches(matrices: Iterable[Run]) -> Iterator[Run]:
    """Neighbours of one shape together, at most BATCH values or one matrix at a time."""
    for (rows, columns), neighbours in itertools.groupby(matrices, lambda one: (one.rows, one.columns)):
        starts = [one.start for one in neighbours]
        most = max(BATCH // (rows * columns), 1)
        for first in range(0, len(starts), most):
            yield Run(starts[first], len(starts[first : first + most]), rows, columns)
