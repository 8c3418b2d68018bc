"""Names and order of a run's checkpoints, and their removal, whenever it is cut off."""

import builtins
import contextlib
import errno
import os
import random
import shutil
from unittest.mock import Mock

import pytest

from megamoe.checkpoint import folders
from megamoe.checkpoint.folders import Age


def write(folder, name, complete="index.json"):
    """A folder with the files that a checkpoint has."""
    checkpoint = folder / name
    checkpoint.mkdir(parents=True)
    for file in ("rank_00000.safetensors", "rank_00001.safetensors", "zero_to_fp32.py"):
        (checkpoint / file).write_bytes(b"some bytes")
    if complete:
        (checkpoint / complete).write_text("{}\n")
    return checkpoint


def names(paths):
    return [path.name for path in paths]


def test_a_name_says_step_and_generation_and_nothing_else_is_one(tmp_path):
    for age, name in ((Age(0, 0), "step_0"), (Age(0, 2000), "step_2000"), (Age(3, 1000), "step_1000.3")):
        assert folders.name_of(age) == name
        assert folders.age_of(tmp_path / name) == age
        assert folders.step_of(tmp_path / name) == age.step
    others = ("step_007", "step_3.0", "step_3.01", "step_3.old", "step_", "step_x", "xstep_1", "step_1.partial",
              "step_-1", "step_1.", "step_١", "step_1١", "step_1\n", "step_" + "9" * 30, "latest")  # fmt: skip
    for name in others:
        assert folders.age_of(tmp_path / name) is None, name
        assert folders.step_of(tmp_path / name) is None, name
        (tmp_path / name).mkdir()
    assert folders.step_folders(tmp_path) == []


def test_the_newest_comes_first_by_generation_and_then_by_step(tmp_path):
    order = ["step_7.2", "step_1500.1", "step_1001.1", "step_2000", "step_1000", "step_999", "step_0"]
    for name in random.Random(0).sample(order, len(order)):
        write(tmp_path, name)
    write(tmp_path, "step_3.9", complete=None)
    (tmp_path / "step_5.9").write_text("a file")
    assert names(folders.step_folders(tmp_path)) == ["step_3.9", *order]
    assert names(folders.checkpoints(tmp_path)) == order
    assert folders.checkpoints(tmp_path / "nothing") == []


def test_what_is_found_at_a_path_is_a_runs_checkpoints_a_folder_of_them_or_the_path_itself(tmp_path):
    for name in ("step_1", "step_2"):
        write(tmp_path / "checkpoints", name)
    write(tmp_path / "checkpoints", "step_3", complete=None)  # somebody has to say that it is passed over
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert names(folders.found_at(path)) == ["step_3", "step_2", "step_1"]
    for path in (tmp_path / "checkpoints" / "step_1", tmp_path / "none"):
        assert folders.found_at(path) == [path]


def test_cleaning_removes_what_a_save_has_left_and_nothing_else(tmp_path):
    for name, complete in (("step_1", "index.json"), ("step_2", "manifest.json"), ("step_4", None)):
        write(tmp_path, name, complete)
    (tmp_path / "step_1" / "index.json").write_text("{")  # damaged, but no leftover
    (tmp_path / "step_3").mkdir()  # as DeepSpeed alone writes it
    (tmp_path / "step_3" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (tmp_path / "step_5").mkdir()
    (tmp_path / "latest.partial").write_text("step_4")
    (tmp_path / "notes").mkdir()
    folders.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_1", "step_2", "step_3"]
    folders.clean(tmp_path / "nothing")


def test_a_link_to_a_checkpoint_is_removed_alone(tmp_path):
    elsewhere = write(tmp_path, "step_1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_1").symlink_to(elsewhere)
    folders.discard(tmp_path / "run" / "step_1")
    assert list((tmp_path / "run").iterdir()) == []
    assert folders.is_complete(elsewhere)
    assert len(list(elsewhere.iterdir())) == 4


def test_a_folder_that_cannot_be_listed_or_an_index_that_cannot_be_read_now_is_no_absent_one(tmp_path, monkeypatch):
    write(tmp_path, "step_1")

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    for module, name in ((os, "scandir"), (builtins, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(OSError, match="Input/output error"):
                folders.checkpoints(tmp_path)
            with contextlib.suppress(OSError):
                folders.clean(tmp_path)
    assert names(folders.checkpoints(tmp_path)) == ["step_1"]


@pytest.mark.parametrize("complete", [folders.INDEX, folders.MANIFEST])
def test_a_removal_that_is_cut_off_leaves_no_checkpoint(tmp_path, monkeypatch, complete):
    checkpoint = write(tmp_path, "step_1", complete)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folders.discard(checkpoint)
    assert names(folders.step_folders(tmp_path)) == ["step_1"]
    assert folders.checkpoints(tmp_path) == []
    folders.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []
