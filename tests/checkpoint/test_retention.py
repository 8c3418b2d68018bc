"""Which checkpoints stay in a run that goes back."""

import pytest

from megamoe.checkpoint import folders
from megamoe.checkpoint.retention import Retention
from megamoe.data.ledger import DataLedger


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of a run that has gone back from step 14 to step 11, and was stopped after that."""
    for name in ("step_11", "step_12", "step_13", "step_12.1", "step_13.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    return tmp_path


LEDGER = DataLedger().gone_back(11, 14, generation=1)


def names(paths):
    return sorted(path.name for path in paths)


def test_what_a_run_has_gone_back_from_stays_after_a_resume_and_is_not_kept_for_good(folder):
    retention = Retention(folder, 1, 0, folder / "step_13.1", LEDGER)
    assert names(retention.left_behind) == ["step_12", "step_13"]
    for name, skipped in (("step_11", 0), ("step_12.1", 2), ("step_13.1", 1)):
        retention.add(folder / name, skipped)
    retention.prune(13)
    assert names(folders.checkpoints(folder)) == ["step_11", "step_12", "step_13", "step_13.1"]


def test_the_newest_checkpoint_that_the_run_might_go_back_to_stays(folder):
    retention = Retention(folder, 1, 0, folder / "step_13.1", LEDGER)
    for name in ("step_11", "step_12.1", "step_13.1"):
        retention.add(folder / name, 0)
    retention.prune(11)
    assert names(folders.checkpoints(folder)) == ["step_11", "step_12", "step_13", "step_13.1"]


def test_a_run_that_goes_back_again_leaves_what_it_had_left(folder):
    retention = Retention(folder, 1, 0, folder / "step_13.1", LEDGER)
    assert retention.path_of(14) == folder / "step_14.1"
    assert retention.go_back(folder / "step_12.1") == 2
    assert names(retention.left_behind) == ["step_12", "step_13", "step_13.1"]
    assert retention.path_of(13) == folder / "step_13.2"
