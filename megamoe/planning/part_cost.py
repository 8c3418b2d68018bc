"""What a part of a block gives a device to do: operators, matrix products among them, bytes that the others move."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BothWays:
    """A count of the forward and of the backward pass."""

    forward: float
    backward: float

    def __add__(self, other: BothWays) -> BothWays:
        return BothWays(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> BothWays:
        return BothWays(self.forward * factor, self.backward * factor)


NONE = BothWays(0, 0)


@dataclass(frozen=True)
class Product:
    """(rows, inside) times (inside, columns), in `groups` that one kernel takes together."""

    rows: float
    columns: float
    inside: float
    groups: int = 1
    calls: float = 1

    @property
    def flops(self) -> float:
        """Of all calls."""
        return 2.0 * self.calls * self.groups * self.rows * self.columns * self.inside

    def bytes(self, itemsize: int) -> float:
        """Read and written by one call, each operand once."""
        size = self.rows * self.inside + self.inside * self.columns + self.rows * self.columns
        return itemsize * self.groups * size

    def backward(self) -> list[Product]:
        """The products for the gradients of the rows and of the weight."""
        return [
            Product(self.rows, self.inside, self.columns, self.groups, self.calls),
            Product(self.columns, self.inside, self.rows, self.groups, self.calls),
        ]


@dataclass(frozen=True)
class Cost:
    """Of one micro-batch on one rank.

    The operators are those that torch dispatches, views left out, with the products among them. The bytes are what the
    operators read and write, those of the products and of attention's own left out.
    """

    operators: BothWays = NONE
    kernels: BothWays = NONE  # instead of the operators, where the block is compiled
    bytes: BothWays = NONE
    products: tuple[Product, ...] = ()  # of the forward pass
    attention: BothWays = NONE  # FLOPs of scores and sums of values

    def times(self, count: int) -> Cost:
        """Of so many equal parts."""
        return Cost(
            self.operators * count, self.kernels * count, self.bytes * count, self.products * count,
            self.attention * count,
        )  # fmt: skip

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.operators + other.operators,
            self.kernels + other.kernels,
            self.bytes + other.bytes,
            self.products + other.products,
            self.attention + other.attention,
        )


def total(*parts: Cost) -> Cost:
    """All of them."""
    return sum(parts, Cost())


# Of one RMSNorm beyond those of the one kernel that a GPU has: torch makes it of others, in fp32.
NORM_OPERATORS_ON_CPU, NORM_PASSES_ON_CPU = BothWays(7, 16), BothWays(9, 24)


def norm_cost(size: float, weight_bytes: int, on_cpu: bool) -> Cost:
    """One RMSNorm.

    Args:
        size: numbers that are normed.
    """
    operators, moved = BothWays(1, 1), BothWays(2, 3) * (weight_bytes * size)
    if on_cpu:
        operators, moved = operators + NORM_OPERATORS_ON_CPU, moved + NORM_PASSES_ON_CPU * (4 * size)
    return Cost(operators, BothWays(1, 2), moved)
