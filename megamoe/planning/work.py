"""What a device is given to do: operators, GEMMs among them, bytes that the others move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Gemm:
    """(rows, inside) times (inside, columns), in `groups` that one kernel takes together."""

    rows: float
    columns: float
    inside: float
    groups: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.groups * self.rows * self.columns * self.inside

    def bytes(self, itemsize: int) -> float:
        """Read and written, each operand once."""
        size = self.rows * self.inside + self.inside * self.columns + self.rows * self.columns
        return itemsize * self.groups * size


@dataclass
class Work:
    """Of one micro-batch on one rank.

    The operators are those that torch dispatches, views left out, with the GEMMs among them. The bytes are what the
    operators read and write, those of the GEMMs, of attention and of the exchange between ranks left out.
    """

    operators: float = 0
    bytes: float = 0
    gemms: Counter[Gemm] = field(default_factory=Counter)  # and how often each is called
    attention: float = 0  # FLOPs of scores and sums of values
    waits: int = 0  # reads of the device by the host

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))
