"""The order of samples as a pure function of (seed, position).

Position p of a run is the p-th sample it trains on, whatever the number of ranks. Which corpus and which sample that
is, is computed, not stored: a keyed permutation needs no index, so a trillion tokens cost no memory and a resumed run
continues exactly where it was.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from functools import lru_cache

from megamoe.errors import UserError

MIX_BLOCK = 4096  # positions in which every corpus gets its exact share; weights are rounded to 1 / MIX_BLOCK
MASK64 = (1 << 64) - 1


def _mix(*values: int) -> int:
    """A 64-bit hash of integers: the finalizer of splitmix64 (Steele et al., 2014), chained."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


def permute(index: int, size: int, *key: int) -> int:
    """Where a pseudo-random permutation of range(size), chosen by `key`, sends `index`. O(1) time and memory.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002).
    """
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    mixed_key = _mix(*key)
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(mixed_key, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class SampleOrder:
    """Which sample of which corpus stands at each position of the run.

    Every block of MIX_BLOCK positions holds each corpus in proportion to its weight, in shuffled order. A corpus is
    walked in a new random order each time it has been walked through.
    """

    sizes: tuple[int, ...]  # samples in each corpus
    shares: tuple[int, ...]  # positions of each corpus in a block; they sum to MIX_BLOCK
    seed: int

    @staticmethod
    def of(sizes: list[int], weights: list[float], seed: int) -> SampleOrder:
        """Raises UserError if a weight is too small to be given one position in a block."""
        ideal = [weight / sum(weights) * MIX_BLOCK for weight in weights]
        shares = [int(share) for share in ideal]
        # Largest remainder: the positions left by rounding down go to those who lost most.
        by_loss = sorted(range(len(ideal)), key=lambda i: shares[i] - ideal[i])
        for i in by_loss[: MIX_BLOCK - sum(shares)]:
            shares[i] += 1
        for weight, share in zip(weights, shares, strict=True):
            if not share:
                raise UserError(f"data: weight {weight} is below 1/{MIX_BLOCK} of the mix; raise it or leave it out.")
        return SampleOrder(tuple(sizes), tuple(shares), seed)

    def at(self, position: int) -> tuple[int, int]:
        """(corpus, sample) at `position`, counted from 0."""
        block, slot = divmod(position, MIX_BLOCK)
        corpus, before = _mixed_block(self.shares, self.seed, block)[slot]
        epoch, index = divmod(block * self.shares[corpus] + before, self.sizes[corpus])
        return corpus, permute(index, self.sizes[corpus], self.seed, corpus, epoch)


@lru_cache(maxsize=4)  # a step reads neighbouring positions
def _mixed_block(shares: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """For each position of a block: its corpus, and how many positions of the same corpus the block has before it."""
    ends = list(itertools.accumulate(shares))
    counts = [0] * len(shares)
    places = []
    for position in range(MIX_BLOCK):
        corpus = bisect.bisect_right(ends, permute(position, MIX_BLOCK, seed, block))
        places.append((corpus, counts[corpus]))
        counts[corpus] += 1
    return places
