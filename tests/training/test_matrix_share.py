"""The shares of all ranks together: each matrix is orthogonalized once, on one rank, from all of its values."""

import itertools

import pytest

from megamoe.training import matrix_share
from megamoe.training.matrix_share import MatrixShare, Run, place_of

SHAPES = [(4, 6), (4, 6), (4, 6), (10, 3), (40, 5), (2, 2), (2, 2)]  # 310 values, of which the fifth has 200
STARTS = [0, *itertools.accumulate(rows * columns for rows, columns in SHAPES)]


def shares_of(ranks):
    partition = -(-STARTS[-1] // ranks)
    return partition, [MatrixShare(SHAPES, partition, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 3, 200])
def test_every_matrix_is_on_one_rank_or_begins_on_one_that_gets_the_rest(ranks):
    partition, shares = shares_of(ranks)
    taken = []
    for rank, share in enumerate(shares):
        for run in share.whole:
            size = run.rows * run.columns
            taken += [(start, run.rows, run.columns) for start in range(run.start, run.end, size)]
            assert rank * partition <= run.start <= run.end <= (rank + 1) * partition
        if share.tail:
            taken.append((share.tail.start, share.tail.rows, share.tail.columns))
            assert sum(share.received) + share.end - share.tail.start == share.tail.rows * share.tail.columns
        assert share.sent == [other.received[rank] for other in shares]
        assert sum(map(bool, share.sent)) <= 1
    assert sorted(taken) == [(start, *shape) for start, shape in zip(STARTS, SHAPES, strict=False)]
    assert {share.is_cut for share in shares} == {any(share.tail for share in shares)}


def test_neighbours_of_one_shape_are_one_batch_up_to_a_size(monkeypatch):
    _, (share,) = shares_of(1)
    assert share.whole == [Run(0, 3, 4, 6), Run(72, 1, 10, 3), Run(102, 1, 40, 5), Run(302, 2, 2, 2)]
    monkeypatch.setattr(matrix_share, "BATCH", 50)
    _, (share,) = shares_of(1)
    assert share.whole[:3] == [Run(0, 2, 4, 6), Run(48, 1, 4, 6), Run(72, 1, 10, 3)]
    assert Run(102, 1, 40, 5) in share.whole


def products_of(share):
    """The products of a step, up to a factor that all matrices have alike."""
    sizes = [(run.count, *sorted((run.rows, run.columns))) for run in share.whole]
    return sum(count * (2 * small**2 * large + small**3) for count, small, large in sizes)


@pytest.mark.parametrize("ranks", [1, 4])
def test_in_order_each_shape_is_one_batch_and_no_rank_has_more_products_than_the_first(ranks):
    shapes = sorted([(16, 64), (64, 16), (64, 128), (128, 64), (64, 64)] * 16, key=place_of)
    partition = sum(rows * columns for rows, columns in shapes) // ranks
    shares = [MatrixShare(shapes, partition, rank, ranks) for rank in range(ranks)]
    assert sum(len(share.whole) for share in shares) <= 5 + ranks - 1
    assert not any(share.is_cut for share in shares)
    assert products_of(shares[0]) == max(map(products_of, shares))
