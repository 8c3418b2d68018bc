"""The order of samples as a pure function of (seed, position).

Position p of a run is the p-th sample it trains on, whatever the number of ranks. Which corpus and which sample that
is, is computed, not stored: a keyed permutation needs no index, so a trillion tokens cost no memory and a resumed run
continues exactly where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TypeVar

import numpy as np

from megamoe.utils.errors import UserError

MIX_HALF = 6  # bits of a half of a slot's number
MIX_BLOCK = 1 << 2 * MIX_HALF  # positions in which every corpus gets its exact share, in units of 1 / MIX_BLOCK
MASK64 = (1 << 64) - 1

Number = TypeVar("Number", int, np.ndarray)  # a whole number of 64 bits, or an array of uint64


def _stir(state: int, value: Number) -> Number:
    """The next state of a hash of numbers, by the finalizer of splitmix64 (Steele et al., 2014)."""
    mixed = (state + value + 0x9E3779B97F4A7C15) & MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK64
    return mixed ^ (mixed >> 31)


def _mix(*values: int) -> int:
    """A 64-bit hash of integers."""
    return reduce(_stir, values, 0)


def permute(index: int, size: int, *key: int) -> int:
    """Where a pseudo-random permutation of range(size), chosen by `key`, sends `index`. O(1) time and memory.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002).
    """
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    while True:
        index = _feistel(index, half, _turns(*key))
        if index < size:
            return index


def _feistel(index: Number, half: int, turns: tuple[int, ...]) -> Number:
    """A permutation of the numbers of 2 x `half` bits."""
    mask = (1 << half) - 1
    left, right = index >> half, index & mask
    for turn in turns:
        left, right = right, left ^ (_stir(turn, right) & mask)
    return left << half | right


@lru_cache(maxsize=64)  # a corpus has one for each epoch, a mix one for each block
def _turns(*key: int) -> tuple[int, ...]:
    """The hashes that the four turns of a permutation begin with."""
    return tuple(_mix(_mix(*key), turn) for turn in range(4))


@dataclass(frozen=True)
class SampleOrder:
    """Which sample of which source stands at each position of a phase.

    Every block of MIX_BLOCK positions holds each source in proportion to its weight, in shuffled order. A source is
    walked in a new random order each time it has been walked through.
    """

    sizes: tuple[int, ...]  # samples in each source
    shares: tuple[int, ...]  # positions of each source in a block; they sum to MIX_BLOCK
    seed: int
    numbers: tuple[int, ...]  # of the sources in the run
    taken: tuple[int, ...]  # samples of each that earlier phases have walked

    @staticmethod
    def of(
        sizes: list[int],
        weights: list[float],
        seed: int,
        numbers: Sequence[int] | None = None,
        taken: Sequence[int] | None = None,
    ) -> SampleOrder:
        """Raises UserError if a weight is too small to be given one position in a block.

        Args:
            numbers: by default, from 0.
            taken: by default, none.
        """
        ideal = [weight / sum(weights) * MIX_BLOCK for weight in weights]
        shares = [int(share) for share in ideal]
        # Largest remainder: the positions left by rounding down go to those who lost most.
        by_loss = sorted(range(len(ideal)), key=lambda i: shares[i] - ideal[i])
        for i in by_loss[: MIX_BLOCK - sum(shares)]:
            shares[i] += 1
        for weight, share in zip(weights, shares, strict=True):
            if not share:
                raise UserError(f"data: weight {weight} is below 1/{MIX_BLOCK} of the mix; raise it or leave it out.")
        return SampleOrder(
            tuple(sizes), tuple(shares), seed, tuple(numbers or range(len(sizes))), tuple(taken or [0] * len(sizes))
        )

    def at(self, position: int) -> tuple[int, int]:
        """(source, sample) at `position`, counted from 0; the source by its place in this mix."""
        source = 0
        if len(self.sizes) > 1:
            block, slot = divmod(position, MIX_BLOCK)
            source = int(_mixed_block(self.shares, self.seed, block)[slot])
        walked = self.taken[source] + self.before(position, source)
        epoch, index = divmod(walked, self.sizes[source])
        return source, permute(index, self.sizes[source], self.seed, self.numbers[source], epoch)

    def before(self, position: int, source: int) -> int:
        """Positions of that source before `position`."""
        if len(self.sizes) == 1:
            return position
        block, slot = divmod(position, MIX_BLOCK)
        mixed = _mixed_block(self.shares, self.seed, block)
        return block * self.shares[source] + int(np.count_nonzero(mixed[:slot] == source))


@lru_cache(maxsize=4)  # a step reads neighbouring positions
def _mixed_block(shares: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    """The corpus at each position of a block, (MIX_BLOCK,) uint16."""
    places = _feistel(np.arange(MIX_BLOCK, dtype=np.uint64), MIX_HALF, _turns(seed, block))
    return np.repeat(np.arange(len(shares), dtype=np.uint16), shares)[places]
