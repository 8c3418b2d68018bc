"""Which checkpoints of a run stay."""

import pytest

from megamoe.checkpoint import folders
from megamoe.checkpoint.retention import Retention
from megamoe.data.ledger import DataLedger


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of a run that has gone back from step 14 to step 11, and was stopped after that."""
    for name in ("step_11", "step_12", "step_13", "step_12.1", "step_13.1"):
        make(tmp_path / name)
    return tmp_path


def make(checkpoint):
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")


LEDGER = DataLedger().gone_back(11, 14, generation=1)


def names(paths):
    return sorted(path.name for path in paths)


# keep_last, keep_every, the steps without skipped ones, and what stays of six; one after the other.
KEPT = [
    [(1, 0, {6}, [6])],
    [(2, 3, {6}, [3, 5, 6])],
    [(1, 2, {6}, [2, 4, 6])],
    [(9, 1, {6}, [1, 2, 3, 4, 5, 6])],
    [(6, 0, {6}, [1, 2, 3, 4, 5, 6])],
    [(0, 0, {6}, [1, 2, 3, 4, 5, 6])],
    [(2, 0, {1, 3}, [3, 5, 6]), (2, 0, {3, 5}, [5, 6]), (1, 0, set(), [6])],
]


def test_the_last_ones_stay_every_nth_and_the_newest_good_one_where_the_last_ones_are_not(tmp_path):
    for number, rounds in enumerate(KEPT):
        folder = tmp_path / str(number)
        for step in range(1, 7):
            make(folder / f"step_{step}")
        for last, every, good, kept in rounds:
            retention = Retention(folder, last, every, folder / "step_6", DataLedger())
            for path in folders.checkpoints(folder):
                retention.add(path, int(folders.step_of(path) not in good))
            (folder / "step_7").mkdir()  # is being written
            retention.prune(None)
            (folder / "step_7").rmdir()
            assert sorted(map(folders.step_of, folder.iterdir())) == kept, (number, last, every)


# Steps skipped before each checkpoint, and the last step to which the run might go back.
@pytest.mark.parametrize(("skipped", "goes_back_to"), [((0, 2, 1), 13), ((0, 0, 0), 11)])
def test_what_a_run_has_gone_back_from_stays_after_a_resume_and_what_it_may_go_back_to(folder, skipped, goes_back_to):
    retention = Retention(folder, 1, 0, folder / "step_13.1", LEDGER)
    assert names(retention.left_behind) == ["step_12", "step_13"]
    for name, count in zip(("step_11", "step_12.1", "step_13.1"), skipped, strict=True):
        retention.add(folder / name, count)
    retention.prune(goes_back_to)
    assert names(folders.checkpoints(folder)) == ["step_11", "step_12", "step_13", "step_13.1"]


def test_a_run_that_goes_back_again_leaves_what_it_had_left(folder):
    retention = Retention(folder, 1, 0, folder / "step_13.1", LEDGER)
    assert retention.path_of(14) == folder / "step_14.1"
    assert retention.go_back(folder / "step_12.1") == 2
    assert names(retention.left_behind) == ["step_12", "step_13", "step_13.1"]
    assert retention.path_of(13) == folder / "step_13.2"
