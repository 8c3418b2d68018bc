"""The order of samples."""

import math
from fractions import Fraction

import numpy as np
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


def test_the_order_has_the_numbers_of_the_first_release():
    assert [permute(index, 1000, 1, 2, 3) for index in range(8)] == [458, 192, 741, 949, 19, 626, 416, 887]
    single = SampleOrder.of([97], [1.0], seed=3)
    places = [single.at(position)[1] for position in (0, 1, 2, 96, 97, 98, 4095, 4096, 10**12)]
    assert places == [90, 77, 14, 2, 32, 31, 47, 82, 18]
    for seed, positions, places in (
        (6, (0, 1, 2, 3), [(0, 151), (0, 390), (1, 13), (0, 395)]),
        (6, (4095, 4096, 4097, 10**12), [(1, 24), (0, 249), (0, 369), (1, 27)]),
        (2**64 + 3, (0, 4095, 10**15), [(2, 760804215), (0, 454), (2, 899554040)]),
    ):
        mix = SampleOrder.of([500, 30, 10**9], [3.0, 1.0, 2.0], seed)
        assert [mix.at(position) for position in positions] == places
