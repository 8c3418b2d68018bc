"""Saving over real ranks: alongside training, and into trouble."""

import time

import pytest
import torch.distributed as dist
from engines import make, same_state, train, train_and_save, writer_for
from ranks import run_ranks

from megamoe.checkpoint import folders, slice_file, verify
from megamoe.checkpoint import writer as writer_module
from megamoe.checkpoint.host_copy import HostCopy
from megamoe.checkpoint.index import read_index


def train_while_saving(folder, ep_size, background):
    """Save after steps 2 and 4, training on at once, with a copy that takes longer than a step's forward pass."""
    real = HostCopy.take

    def slow(self, *args):
        time.sleep(0.5)
        return real(self, *args)

    engine = make(ep_size)
    writer = writer_for(engine, folder, background=background)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopy, "take", slow)
        for step in (2, 4):
            train(engine, 2, step - 2, writer)
            writer.save(step)
        train(engine, 3, 4, writer)  # everything changes while the thread writes
        assert writer.complete()
    assert not writer.pending


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory):
    """Checkpoints of two runs that end at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("alone")
    for step in (2, 4):
        run_ranks(2, train_and_save, folder / str(step), 2, 2, step)
    return folder


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_the_state_at_its_step_though_training_went_on(tmp_path, saved_alone, background):
    run_ranks(2, train_while_saving, tmp_path, 2, background)
    for step in (2, 4):
        same_state(saved_alone / str(step) / f"step_{step}", tmp_path / f"step_{step}")


def save_without_room(folder):
    import psutil

    engine = make(1)
    train(engine, 1)
    memory = psutil.virtual_memory()._replace(available=1000)
    writer = writer_for(engine, folder)
    real_write, written = writer._write_file, []
    writer._write_file = lambda *work: (time.sleep(0.3), real_write(*work), written.append(True))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: memory)
        writer.save(1)
        writer.before_update()
        thread_is_done = bool(written)  # it may not read what the next step changes
        train(engine, 1, 1)
        assert writer.complete()
    return thread_is_done


def test_where_memory_has_no_room_for_a_copy_the_save_is_waited_for(tmp_path):
    assert run_ranks(1, save_without_room, tmp_path / "a") == [True]
    run_ranks(1, train_and_save, tmp_path / "b", 1, 2, 1)
    same_state(tmp_path / "b" / "step_1", tmp_path / "a" / "step_1")


def full(*args):
    raise OSError(28, "No space left on device")


def save_with_a_full_disk_on_rank_1(folder):
    """Step 1 is saved; at step 2 rank 1's disk is full; step 3 is saved. Returns what `complete` said."""
    engine = make(2)
    writer = writer_for(engine, folder)
    outcomes = []
    for step in (1, 2, 3):
        train(engine, 1, step - 1)
        with pytest.MonkeyPatch.context() as patch:
            if step == 2 and dist.get_rank() == 1:
                patch.setattr(slice_file, "_write", full)
            writer.save(step)
            train(engine, 0)
            outcomes.append(writer.complete())
        dist.barrier()
        outcomes.append(sorted(path.name for path in folder.iterdir()))
    return outcomes


def test_a_save_that_fails_on_one_rank_leaves_the_older_checkpoint_and_training_goes_on(tmp_path):
    first, second = run_ranks(2, save_with_a_full_disk_on_rank_1, tmp_path / "checkpoints")
    assert first == second
    assert first == [True, ["latest", "step_1"], False, ["latest", "step_1"], True, ["latest", "step_1", "step_3"]]
    for name in ("step_1", "step_3"):
        assert verify.problems(tmp_path / "checkpoints" / name) == []


def fail(*args, **kwargs):
    raise OSError(30, "Read-only file system")


def fail_without_words(*args, **kwargs):
    raise MemoryError


TROUBLE = [
    (writer_module, "write_index", 0, fail),
    (folders, "clean", 0, fail),
    (writer_module, "write_tensors", 1, fail_without_words),
    (folders, "prune", 0, fail),
    (HostCopy, "take", 1, fail),
    (writer_module, "_add_script", 0, fail),
]


def save_in_trouble(folder):
    """Whether each of these saves is a checkpoint; all ranks come to the end, whatever happens on one of them."""
    engine = make(2)
    train(engine, 1)
    outcomes = []
    for step, (owner, name, rank, trouble) in enumerate(TROUBLE):
        writer = writer_for(engine, folder, keep_last=1)
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                patch.setattr(owner, name, trouble)
            writer.save(step)
            outcomes.append(writer.complete())
    return outcomes


def test_no_failure_on_one_rank_hangs_the_others_or_makes_a_checkpoint_of_less(tmp_path):
    outcomes = run_ranks(2, save_in_trouble, tmp_path / "checkpoints")
    # Cleaning fails only where there is something to clean; that old ones cannot be removed is no failed save.
    assert outcomes == [[False, True, False, True, False, False]] * 2
    left = folders.step_folders(tmp_path / "checkpoints")
    assert [folders.step_of(path) for path in left] == [3, 1]
    assert all(verify.problems(path) == [] for path in left)


def save_with_a_stranger(folder):
    """Rank 1's part comes from another save, as of a process that has outlived its run."""
    engine = make(1)
    train(engine, 1)
    writer = writer_for(engine, folder)
    if dist.get_rank() == 1:
        real = writer._write_file
        writer._write_file = lambda checkpoint, save_id, *rest: real(checkpoint, "0" * 32, *rest)
    writer.save(1, hold=True)
    return writer.complete()


def test_a_file_of_another_save_is_not_committed(tmp_path, capfd):
    assert run_ranks(2, save_with_a_stranger, tmp_path / "checkpoints") == [False, False]
    assert folders.step_folders(tmp_path / "checkpoints") == []


def go_back_and_save(folder):
    """A run at step 3 goes back to step 1, and comes to step 3 again."""
    engine = make(1)
    train(engine, 1)
    writer = writer_for(engine, folder)
    for step in (1, 2, 3):
        writer.save(step, hold=True)
        assert writer.complete()
    writer = writer_for(engine, folder, resumed=folder / "step_1", keep_last=3)
    for step in (2, 3):
        writer.save(step, hold=True)
        assert writer.complete()


def test_a_step_that_is_saved_again_goes_to_a_new_folder_and_is_the_newest(tmp_path):
    folder = tmp_path / "checkpoints"
    run_ranks(1, go_back_and_save, folder)
    assert [path.name for path in folders.checkpoints(folder)] == ["step_3.1", "step_2.1", "step_3", "step_2", "step_1"]
    assert (folder / "latest").read_text() == "step_3.1"
    assert read_index(folder / "step_3.1").parent == "step_1"


def save_into_a_run_folder_that_is_gone(folder):
    engine = make(1)
    writer = writer_for(engine, folder)
    folder.parent.rmdir()
    writer.save(1, hold=True)
    return writer.complete()


def test_a_run_folder_that_was_removed_is_not_made_again(tmp_path, capfd):
    assert run_ranks(1, save_into_a_run_folder_that_is_gone, tmp_path / "run" / "checkpoints") == [False]
    assert not (tmp_path / "run").exists()


def save_bad_ones(folders):
    engine = make(1)
    train(engine, 1)
    for folder, saves in folders.items():
        writer = writer_for(engine, folder, keep_last=1)
        for step, options in enumerate(saves, start=1):
            writer.save(step, hold=True, **options)
            assert writer.complete()


def test_checkpoints_with_skipped_steps_or_a_loss_that_climbs_do_not_push_out_the_last_good_one(tmp_path):
    climbing = [{"good_until": 1}, {"good_until": 2}, {"good_until": 2}, {"good_until": 2}]
    run_ranks(1, save_bad_ones, {
        tmp_path / "skipped": [{"skipped": count} for count in (0, 5, 1)],
        tmp_path / "climbing": climbing,
        tmp_path / "came down": [*climbing, {"good_until": 5}],
    })  # fmt: skip
    kept = {path.name: [one.name for one in folders.checkpoints(path)] for path in tmp_path.iterdir()}
    assert kept == {"skipped": ["step_3", "step_1"], "climbing": ["step_4", "step_2"], "came down": ["step_5"]}
