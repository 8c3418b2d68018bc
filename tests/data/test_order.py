"""The order of samples."""

import bisect
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from refusals import has, refusal

from megamoe.data.order import MIX_BLOCK, SampleOrder, permute

# --- the permutation ---


def test_permute_is_a_bijection():
    for size in (*range(1, 71), 127, 128, 129, 1000, 4096, 4097):
        for key in ((0,), (3, 5)):
            assert sorted(permute(index, size, *key) for index in range(size)) == list(range(size)), (size, key)


# --- the order of samples ---


def walk(order, start, count):
    return [order.at(position) for position in range(start, start + count)]


def test_each_corpus_is_walked_through_before_it_begins_again():
    sizes = [97, 40, 701]
    visits = [[] for _ in sizes]
    for corpus, sample in walk(SampleOrder.of(sizes, [5.0, 1.0, 2.0], seed=4), 0, 2 * MIX_BLOCK):
        visits[corpus].append(sample)
    for samples, size in zip(visits, sizes, strict=True):
        epochs = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
        assert len(epochs) >= 2, size
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs), size


def independent_shares(weights):
    """Largest remainder in exact arithmetic."""
    total = sum(Fraction(weight) for weight in weights)
    ideal = [Fraction(weight) / total * MIX_BLOCK for weight in weights]
    shares = [math.floor(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: ideal[i] - shares[i], reverse=True)
    for i in by_remainder[: MIX_BLOCK - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def test_shares_are_those_of_the_largest_remainder():
    draw = np.random.default_rng(7)
    for _ in range(200):
        weights = draw.uniform(0.01, 1, draw.integers(1, 12)).tolist()
        shares = SampleOrder.of([10] * len(weights), weights, seed=0).shares
        assert sum(shares) == MIX_BLOCK, weights
        assert shares == independent_shares(weights), weights
    assert SampleOrder.of([1, 1], [3.0, 1.0], 0).shares == (3072, 1024)
    assert SampleOrder.of([1] * 3, [1.0] * 3, 0).shares == (1366, 1365, 1365)


def test_a_weight_too_small_for_one_position_is_refused():
    has(refusal(SampleOrder.of, [5, 5], [1.0, 1e-5], 0), "weight 1e-05", "1/4096", "raise it or leave it out")
    assert SampleOrder.of([5, 5], [1.0, 1 / 4095], 0).shares == (4095, 1)


# --- the same order in every version ---


def mix_by_definition(*values):
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state


def permute_by_definition(index, size, *key):
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    mixed_key = mix_by_definition(*key)
    while True:
        left, right = divmod(index, 1 << half)
        for turn in range(4):
            left, right = right, left ^ (mix_by_definition(mixed_key, turn, right) % (1 << half))
        index = left << half | right
        if index < size:
            return index


@functools.cache
def block_by_definition(shares, seed, block):
    ends = list(itertools.accumulate(shares))
    counts, places = [0] * len(shares), []
    for slot in range(4096):
        corpus = bisect.bisect_right(ends, permute_by_definition(slot, 4096, seed, block))
        places.append((corpus, counts[corpus]))
        counts[corpus] += 1
    return places


def at_by_definition(order, position):
    block, slot = divmod(position, 4096)
    corpus, before = block_by_definition(order.shares, order.seed, block)[slot]
    epoch, index = divmod(block * order.shares[corpus] + before, order.sizes[corpus])
    return corpus, permute_by_definition(index, order.sizes[corpus], order.seed, corpus, epoch)


@pytest.mark.parametrize(("seed", "corpora"), [(0, 2), (12, 1), (2**31, 9), (2**63 - 1, 3), (2**64 + 3, 2)])
def test_the_order_is_that_of_its_definition_computed_number_by_number(seed, corpora):
    draw = np.random.default_rng([seed % 2**32, corpora])
    for largest in (3, 100, 10**6, 10**12):
        weights = draw.uniform(0.01, 1, corpora).tolist()
        order = SampleOrder.of(draw.integers(1, largest, corpora).tolist(), weights, seed)
        block = int(draw.integers(0, 10**9)) if largest > 3 else 0
        slots = [0, 1, 2, 4094, 4095, 4096, *draw.integers(0, 4096, 50).tolist()]
        for position in (block * 4096 + slot for slot in slots):
            assert order.at(position) == at_by_definition(order, position), (order.sizes, position)
