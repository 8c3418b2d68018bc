"""Which matrices are multiplied at once, and how their work is split; that each is orthogonalized as a whole:
tests/training/test_muon.py."""

import pytest

from megamoe.training import matrix_share
from megamoe.training.matrix_share import MatrixShare, Run, place_of


def test_neighbours_of_one_shape_are_one_batch_up_to_a_size(monkeypatch):
    shapes = [(4, 6), (4, 6), (4, 6), (10, 3), (40, 5), (2, 2), (2, 2)]
    whole = MatrixShare(shapes, 310, 0, 1).whole
    assert whole == [Run(0, 3, 4, 6), Run(72, 1, 10, 3), Run(102, 1, 40, 5), Run(302, 2, 2, 2)]
    monkeypatch.setattr(matrix_share, "BATCH", 50)
    small = MatrixShare(shapes, 310, 0, 1).whole
    assert small == [Run(0, 2, 4, 6), Run(48, 1, 4, 6), *whole[1:]]


def work_of(share):
    """The FLOPs of a step, up to a factor that all matrices have alike."""
    sizes = [(run.count, *sorted((run.rows, run.columns))) for run in share.whole]
    return sum(count * (2 * small**2 * large + small**3) for count, small, large in sizes)


@pytest.mark.parametrize("ranks", [1, 4])
def test_in_order_each_shape_is_one_batch_and_no_rank_has_more_work_than_the_first(ranks):
    shapes = sorted([(16, 64), (64, 16), (64, 128), (128, 64), (64, 64)] * 16, key=place_of)
    partition = sum(rows * columns for rows, columns in shapes) // ranks
    shares = [MatrixShare(shapes, partition, rank, ranks) for rank in range(ranks)]
    assert sum(len(share.whole) for share in shares) <= 5 + ranks - 1
    assert not any(share.is_cut for share in shares)
    assert work_of(shares[0]) == max(map(work_of, shares))
