"""Saving over real ranks: alongside training, and into trouble."""

import threading
from unittest.mock import Mock

import psutil
import pytest
import torch.distributed as dist
from engines import make, same_state, save, train, writer_for
from ranks import run_ranks
from toy import new_store

from megamoe.checkpoint import folders, slice_file, verify
from megamoe.checkpoint import writer as writer_module
from megamoe.checkpoint.host_copy import HostCopy
from megamoe.checkpoint.index import read_index
from megamoe.utils import disk

LONG = 300  # seconds, after which a hang ends


def train_while_saving(folder):
    """Save after steps 2 and 4: once while nothing else happens; once training on at once, with a copy that takes
    longer than a step's forward and backward pass; once where memory has no room for a copy."""
    engine = make(2)
    for step in (2, 4):
        train(engine, 2, step - 2)
        save(engine, folder / f"alone {step}", step)
    waits = threading.Event()  # set once training waits for the copy, or without one for the file
    for has_room in (True, False):
        engine = make(2)
        writer = writer_for(engine, folder / f"with room {has_room}", waiting=waits.set)
        late, name = (HostCopy, "take") if has_room else (writer_module.CheckpointWriter, "_write_file")
        real, memory = getattr(late, name), psutil.virtual_memory()._replace(available=10**12 if has_room else 1000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
            patch.setattr(late, name, lambda *args, real=real: (waits.wait(LONG), real(*args))[1])
            for step in (2, 4):
                train(engine, 2, step - 2, writer)
                if writer.pending:
                    assert writer.complete()
                waits.clear()
                writer.save(step)
            train(engine, 3, 4, writer)  # everything changes while the thread writes
            assert writer.complete()
        assert not writer.pending


def test_a_checkpoint_holds_the_state_at_its_step_though_training_went_on(tmp_path):
    run_ranks(2, train_while_saving, tmp_path)
    for step in (2, 4):
        for has_room in (True, False):
            found = tmp_path / f"with room {has_room}" / f"step_{step}"
            same_state(tmp_path / f"alone {step}" / f"step_{step}", found)


fail = Mock(side_effect=OSError(30, "Read-only file system"))


def as_a_stranger(self, checkpoint, save_id, *rest):
    """A part of another save, as of a process that has outlived its run."""
    return REAL_WRITE(self, checkpoint, "0" * 32, *rest)


REAL_WRITE = writer_module.CheckpointWriter._write_file
# What goes wrong on which rank, and whether there is a checkpoint all the same: cleaning fails only where there is
# something to clean; that old ones cannot be removed is no failed save.
TROUBLE = [
    (writer_module, "write_index", 0, fail, False),
    (folders, "clean", 0, fail, True),
    (writer_module, "write_slices", 1, Mock(side_effect=MemoryError), False),
    (folders, "discard", 0, fail, True),
    (HostCopy, "take", 1, fail, False),
    (writer_module, "_add_script", 0, fail, False),
    (slice_file, "_header", 1, Mock(side_effect=OSError(28, "No space left on device")), False),
    (writer_module.CheckpointWriter, "_write_file", 1, as_a_stranger, False),
]


def save_in_trouble(folder):
    """Whether each of these saves is a checkpoint, and what then lies in the folder; training goes on after each."""
    engine = make(2)
    outcomes = []
    for step, (owner, name, rank, trouble, _) in enumerate(TROUBLE):
        train(engine, 1, step)
        writer = writer_for(engine, folder, keep_last=1)
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                patch.setattr(owner, name, trouble)
            writer.save(step)
            saved = writer.complete()
        dist.barrier()
        outcomes.append((saved, sorted(path.name for path in folder.iterdir())))
        dist.barrier()
    return outcomes


def test_a_save_that_fails_on_one_rank_hangs_no_other_and_leaves_the_older_checkpoint_alone(tmp_path):
    outcomes, others = run_ranks(2, save_in_trouble, tmp_path / "checkpoints")
    assert outcomes == others
    assert [saved for saved, _ in outcomes] == [is_saved for *_, is_saved in TROUBLE]
    after_1, after_3 = ["latest", "step_1"], ["latest", "step_1", "step_3.1"]
    assert [left for _, left in outcomes] == [[], after_1, after_1, *[after_3] * 5]
    assert all(verify.problems(path) == [] for path in folders.step_folders(tmp_path / "checkpoints"))


def fail_and_save(folder):
    """Skipped steps in the checkpoint after a save that failed."""
    engine = make(1)
    train(engine, 1)
    writer = writer_for(engine, folder)
    for skipped in (1, 2, 4):
        with pytest.MonkeyPatch.context() as patch:
            if skipped < 4:
                patch.setattr(writer_module, "write_index", fail)
            writer.save(skipped, hold=True, skipped=skipped)
            assert writer.complete() == (skipped == 4)
    return read_index(folder / "step_4").training.skipped_in_window


def test_a_save_that_failed_passes_its_skipped_steps_on(tmp_path):
    assert run_ranks(1, fail_and_save, tmp_path / "checkpoints") == [7]


def go_back_and_save(folder):
    """A run at step 3 goes back to step 1, and comes to step 3 again; returns the keys in the store after each save."""
    engine = make(1)
    train(engine, 1)
    store, keys = new_store("both writers"), []
    writer = writer_for(engine, folder, store=store)
    for step in (1, 2, 3):
        writer.save(step, hold=True)
        assert writer.complete()
        keys.append(store.num_keys())
    writer = writer_for(engine, folder, store=store, resumed=folder / "step_1", keep_last=3)
    for step in (2, 3):
        writer.save(step, hold=True)
        assert writer.complete()
    return keys


def test_a_step_that_is_saved_again_goes_to_a_new_folder_and_is_the_newest(tmp_path):
    folder = tmp_path / "checkpoints"
    (keys,) = run_ranks(1, go_back_and_save, folder)
    assert keys[2] == keys[1]  # no more with every save
    assert [path.name for path in folders.checkpoints(folder)] == ["step_3.1", "step_2.1", "step_3", "step_2", "step_1"]
    assert (folder / "latest").read_text() == "step_3.1"
    assert read_index(folder / "step_3.1").parent == "step_1"


def flushed_before_the_index(folder):
    """Names of what rank 0 has on the disk when it writes the index, whose creation is the commit, and the others at
    all."""
    flushed, at_commit = [], []
    flush, write_index = disk.flush, writer_module.write_index
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "flush", lambda path: (flushed.append(path.name), flush(path)))
        patch.setattr(writer_module, "write_index", lambda *args: (at_commit.extend(flushed), write_index(*args)))
        save(make(1), folder, 1)
    return at_commit or flushed


def test_the_files_of_all_ranks_are_on_the_disk_before_the_index_says_that_they_are(tmp_path):
    flushed = run_ranks(2, flushed_before_the_index, tmp_path / "checkpoints")
    files = {path.name for path in (tmp_path / "checkpoints/step_1").glob("*.safetensors")}
    assert len(files) == 2
    assert [len(files & set(names)) for names in flushed] == [1, 1]


def save_into_a_run_folder_that_is_gone(folder):
    engine = make(1)
    writer = writer_for(engine, folder)
    folder.parent.rmdir()
    writer.save(1, hold=True)
    return writer.complete()


def test_a_run_folder_that_was_removed_is_not_made_again(tmp_path, capfd):
    assert run_ranks(1, save_into_a_run_folder_that_is_gone, tmp_path / "run" / "checkpoints") == [False]
    assert not (tmp_path / "run").exists()
