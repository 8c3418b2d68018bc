"""Saving over real ranks: beside training, into trouble, and under the names that DeepSpeed gives."""

import time

import pytest
import torch.distributed as dist
from engines import make, same_state, save_by_deepspeed, train, train_and_save, writer_for
from ranks import run_ranks

from megamoe.checkpoint import manifest
from megamoe.checkpoint.writer import HostCopy, engine_files


def train_while_saving(folder, ep_size, background):
    """Save after steps 2 and 4, training on at once, with a copy that takes longer than a step's forward pass."""
    real = HostCopy.take

    def slow(self, state):
        time.sleep(0.5)
        return real(self, state)

    engine = make(ep_size)
    writer = writer_for(engine, folder, ep_size, background=background)
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
        run_ranks(2, train_and_save, folder, 2, 2, step)
    return folder


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_the_state_at_its_step_though_training_went_on(tmp_path, saved_alone, background):
    run_ranks(2, train_while_saving, tmp_path, 2, background)
    for step in (2, 4):
        same_state(saved_alone / f"step_{step}", tmp_path / f"step_{step}")


def save_without_room(folder):
    import psutil

    engine = make(1)
    train(engine, 1)
    memory = psutil.virtual_memory()._replace(available=1000)
    writer = writer_for(engine, folder, 1)
    real_write, written = writer._write, []
    writer._write = lambda *work: (time.sleep(0.3), real_write(*work), written.append(True))
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


def save_with_a_full_disk_on_rank_1(folder):
    """Step 1 is saved; at step 2 rank 1's disk is full; step 3 is saved. Returns what `complete` said."""
    engine = make(2)
    writer = writer_for(engine, folder, 2)
    outcomes = []

    def full(self, data):
        self.error = OSError(28, "No space left on device")
        raise self.error

    for step in (1, 2, 3):
        train(engine, 1, step - 1)
        with pytest.MonkeyPatch.context() as patch:
            if step == 2 and dist.get_rank() == 1:
                patch.setattr(manifest.HashedFile, "write", full)
            writer.save(step)
            train(engine, 0)
            outcomes.append(writer.complete())
        dist.barrier()
        outcomes.append(sorted(path.name for path in folder.iterdir()))
    return outcomes


def test_a_save_that_fails_on_one_rank_leaves_the_older_checkpoint_and_training_goes_on(tmp_path):
    first, second = run_ranks(2, save_with_a_full_disk_on_rank_1, tmp_path)
    assert first == second
    assert first == [True, ["latest", "step_1"], False, ["latest", "step_1"], True, ["latest", "step_1", "step_3"]]
    assert manifest.problems(tmp_path / "step_1") == manifest.problems(tmp_path / "step_3") == []


def fail(*args, **kwargs):
    raise OSError(30, "Read-only file system")


def save_in_trouble(folder):
    """Whether each of four saves was whole; all ranks come to the end, whatever happens on one of them."""
    engine = make(2)
    train(engine, 1)
    outcomes = []
    for step, (module, name, rank) in enumerate(
        [(manifest, "commit", 0), (manifest, "clean", 0), (manifest, "write_hashed", 1), (manifest, "prune", 0)]
    ):
        writer = writer_for(engine, folder, 2, keep_last=1)
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                error = MemoryError() if name == "write_hashed" else None  # one without words
                patch.setattr(module, name, fail if error is None else lambda *a, e=error: (_ for _ in ()).throw(e))
            writer.save(step, hold=True)
            outcomes.append(writer.complete())
            writer.close()
    return outcomes


def test_no_failure_on_one_rank_hangs_the_others_or_makes_a_checkpoint_of_less(tmp_path):
    outcomes = run_ranks(2, save_in_trouble, tmp_path)
    # Cleaning fails only where there is something to clean; that old ones cannot be removed is no failed save.
    assert outcomes == [[False, True, False, True]] * 2
    assert sorted(map(manifest.step_of, manifest.checkpoints(tmp_path))) == [1, 3]
    assert all(manifest.problems(path) == [] for path in manifest.checkpoints(tmp_path))


def files_of_rank(ep_size):
    engine = make(ep_size)
    train(engine, 1)
    return sorted(engine_files(engine))


def test_the_files_are_those_that_deepspeed_names(tmp_path):
    names = run_ranks(2, files_of_rank, 2)
    run_ranks(2, save_by_deepspeed, tmp_path, 2)
    written = {path.name for path in (tmp_path / "step_3").iterdir()}
    assert set(names[0]) | set(names[1]) == written
    assert not set(names[0]) & set(names[1])  # each is written by one rank
