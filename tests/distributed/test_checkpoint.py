"""Checkpoints over real ranks: any topology to any other, DeepSpeed's own loader, torn saves, full disks."""

import contextlib
import io
import math
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toy import PRESET, ds_config

from megamoe import manifest
from megamoe.checkpoint import CheckpointWriter, HostCopy, engine_files
from megamoe.config import ModelConfig, UserError
from megamoe.ds_config import read_schedule
from megamoe.engine import build_engine
from megamoe.export import write_universal
from megamoe.model import Decoder
from megamoe.names import is_buffer, plain_name
from megamoe.reader import KINDS, load_buffers, open_source
from megamoe.restore import restore_first_that_holds
from megamoe.router import LoadBalancer

CONFIG = ModelConfig(**{**PRESET, "num_local_experts": 8})
EXPERTS = CONFIG.num_local_experts
BATCH = 8  # samples a step, whatever the ranks


def make(ep_size, stage=2, seed=0, **ds_changes):
    """(engine, first expert) of this rank."""
    ds = ds_config(BATCH // dist.get_world_size(), **ds_changes)
    ds["zero_optimization"]["stage"] = stage
    ds["scheduler"]["params"]["total_num_steps"] = 60
    ep_rank = dist.get_rank() % ep_size
    engine = build_engine(Decoder(CONFIG, seed, ep_size, ep_rank), ds, read_schedule(ds, "ds"))
    return engine, ep_rank * (EXPERTS // ep_size)


def train(engine, steps, first=0, writer=None):
    """Train on this rank's share of batches that depend on the step alone; returns the mean losses over all ranks."""
    routers = engine.module.routers()
    balancer = LoadBalancer(routers, CONFIG.router_bias_rate, CONFIG.router_bias_rule, CONFIG.router_load_decay)
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(4, (BATCH, 17), generator=generator).cumsum(1) % CONFIG.vocab_size
        ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(ids[:, :-1], ids[:, 1:])
        engine.backward(loss)
        if writer:
            writer.before_update()
        engine.step()
        balancer.step(engine.was_step_applied())
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def writer_for(engine, folder, ep_size, **options):
    return CheckpointWriter(engine, folder, {"world_size": dist.get_world_size(), "ep_size": ep_size}, **options)


def save(engine, folder, ep_size, step):
    writer = writer_for(engine, folder, ep_size)
    writer.save(step, hold=True)
    assert writer.complete()


def train_and_save(folder, ep_size, stage=2, steps=3, further=0, **ds_changes):
    """Returns the losses of the steps before the save, and of those behind it."""
    engine, _ = make(ep_size, stage, **ds_changes)
    before = train(engine, steps)
    save(engine, folder, ep_size, steps)
    return before, train(engine, further, steps)


def load_and_train(checkpoint, ep_size, stage=2, steps=0, resave=None, **ds_changes):
    """Returns (step, learning rate) as restored, and the losses of `steps` more."""
    engine, first_expert = make(ep_size, stage, seed=99, **ds_changes)  # other weights, so that a restore shows
    assert restore_first_that_holds(engine, [checkpoint], first_expert) == checkpoint
    state = engine.global_steps, engine.get_lr()
    if resave:
        save(engine, resave, ep_size, engine.global_steps)
    return state, train(engine, steps, engine.global_steps)


def same_state(checkpoint, other):
    """Whether two checkpoints hold the same training state, to the bit."""
    one, two = open_source(checkpoint), open_source(other)
    assert one.shapes == two.shapes
    for name, shape in one.shapes.items():
        for kind in KINDS:
            values = one.read(name, kind, 0, math.prod(shape))
            assert values.numel() == math.prod(shape)
            assert torch.equal(values, two.read(name, kind, 0, math.prod(shape))), (name, kind)
    assert one.buffers.keys() == two.buffers.keys()
    assert all(torch.equal(value, two.buffers[name]) for name, value in one.buffers.items())
    states = one.training_state(), two.training_state()
    for key in ("global_steps", "global_samples", "skipped_steps", "adam_step"):
        assert states[0][key] == states[1][key]
    assert states[0]["lr_scheduler"]["last_epoch"] == states[1]["lr_scheduler"]["last_epoch"]


# --- any topology to any other --------------------------------------------------------------------------------------

SAVED = [(1, 1, 1), (2, 2, 2), (4, 2, 2), (8, 8, 1)]  # ranks, ep_size, ZeRO stage
LOADED = [(1, 1, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1), (4, 4, 2), (8, 2, 2), (8, 4, 1), (8, 8, 2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each of SAVED, with moments that differ from weight to weight."""
    folder = tmp_path_factory.mktemp("saved")
    for ranks, ep_size, stage in SAVED:
        run_ranks(ranks, train_and_save, folder / f"{ranks}x{ep_size}", ep_size, stage)
    return folder


def resave_all(saved, out, ep_size, stage):
    """Restore every saved checkpoint into one engine, one after the other, and save each again."""
    engine, first_expert = make(ep_size, stage, seed=99)
    for ranks, saved_ep_size, _ in SAVED:
        name = f"{ranks}x{saved_ep_size}"
        assert restore_first_that_holds(engine, [saved / name / "step_3"], first_expert)
        save(engine, out / name, ep_size, 3)
        source = open_source(out / name / "step_3")
        masters = {
            weight: source.read(weight, "fp32", 0, math.prod(shape)).view(shape)
            for weight, shape in source.shapes.items()
        }
        # The weights that the next forward pass uses are the restored ones, on every rank.
        for weight, value in engine.module.state_dict().items():
            assert is_buffer(weight) or torch.equal(value, masters[plain_name(weight, first_expert)]), weight


@pytest.mark.parametrize(("ranks", "ep_size", "stage"), LOADED)
def test_every_saved_topology_is_restored_to_the_bit_on_every_other(tmp_path, saved, ranks, ep_size, stage):
    run_ranks(ranks, resave_all, saved, tmp_path, ep_size, stage)
    for saved_ranks, saved_ep_size, _ in SAVED:
        name = f"{saved_ranks}x{saved_ep_size}"
        same_state(saved / name / "step_3", tmp_path / name / "step_3")
        source = open_source(tmp_path / name / "step_3")
        assert (source.world_size, source.ep_size, source.zero_stage) == (ranks, ep_size, stage)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Saved at step 3 by 4 ranks x ep_size 2, with the losses of the 50 steps that follow."""
    folder = tmp_path_factory.mktemp("long_run")
    (_, losses), *_ = run_ranks(4, train_and_save, folder, 2, 2, 3, 50)
    return folder / "step_3", losses


@pytest.mark.parametrize(("ranks", "ep_size", "stage"), [(1, 1, 2), (2, 1, 1), (2, 2, 2), (8, 8, 1)])
def test_on_another_topology_the_next_50_losses_are_equal_to_rounding(long_run, ranks, ep_size, stage):
    checkpoint, losses = long_run
    (step, rates), resumed = run_ranks(ranks, load_and_train, checkpoint, ep_size, stage, 50)[0]
    assert step == 3
    assert rates == pytest.approx([0.0075] * len(rates))  # 3/4 of the way up to 1e-2
    assert len(resumed) == 50
    assert losses[0] - losses[-1] > 1  # it learns, so the losses can tell
    torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_on_the_same_topology_the_next_losses_are_the_same_to_the_bit(tmp_path, ranks, stage, precision):
    (_, losses), *_ = run_ranks(ranks, train_save_with, tmp_path, stage, precision)
    _, resumed = run_ranks(ranks, load_with, tmp_path / "step_3", stage, precision)[0]
    assert resumed == losses


def train_save_with(folder, stage, precision):
    return train_and_save(folder, 2, stage, 3, 8, **precision)


def load_with(checkpoint, stage, precision):
    return load_and_train(checkpoint, 2, stage, 8, **precision)


# --- DeepSpeed itself -----------------------------------------------------------------------------------------------


def load_by_deepspeed(folder, tag, ep_size, steps, universal=False):
    engine, _ = make(ep_size, seed=99, **({"checkpoint": {"load_universal": True}} if universal else {}))
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    assert path
    if universal:  # DeepSpeed restores no buffers from it
        load_buffers(engine.module, open_source(folder / tag))
    return train(engine, steps, engine.global_steps)


def test_deepspeeds_own_loader_reads_a_checkpoint_at_the_same_topology(long_run):
    checkpoint, losses = long_run
    resumed = run_ranks(4, load_by_deepspeed, checkpoint.parent, checkpoint.name, 2, 5)[0]
    assert resumed == losses[:5]


def save_by_deepspeed(folder, ep_size):
    engine, _ = make(ep_size)
    train(engine, 3)
    engine.save_checkpoint(str(folder), tag="step_3")
    return train(engine, 5, 3)


def test_a_checkpoint_that_deepspeed_has_written_is_resharded_too(tmp_path):
    losses = run_ranks(4, save_by_deepspeed, tmp_path, 2)[0]
    _, resumed = run_ranks(2, load_and_train, tmp_path / "step_3", 1, 2, 5)[0]
    torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def universal(long_run):
    checkpoint, _ = long_run
    out = checkpoint.parent / "universal" / "step_3"
    write_universal(open_source(checkpoint, open_files=1), checkpoint, out)
    (out.parent / "latest_universal").write_text("step_3")
    return out


def test_the_universal_layout_holds_the_same_state_and_a_manifest_that_verifies(long_run, universal):
    same_state(long_run[0], universal)
    assert manifest.problems(universal) == []
    assert len(manifest.read_manifest(universal)["files"]) == len(open_source(universal).shapes) * 4 + 3


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 2)])
def test_the_universal_layout_goes_on_at_any_ep_size(long_run, universal, ranks, ep_size):
    _, resumed = run_ranks(ranks, load_and_train, universal, ep_size, 2, 5)[0]
    torch.testing.assert_close(resumed, long_run[1][:5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeeds_own_universal_loader_reads_it_at_an_ep_size_of_1(long_run, universal, ranks):
    resumed = run_ranks(ranks, load_by_deepspeed, universal.parent, "step_3", 1, 5, True)[0]
    torch.testing.assert_close(resumed, long_run[1][:5], atol=1e-5, rtol=0)


# --- saving beside training -----------------------------------------------------------------------------------------


def train_while_saving(folder, ep_size, background):
    """Save after steps 2 and 4, training on at once, with a copy that takes longer than a step's forward pass."""
    real = HostCopy.take

    def slow(self, state):
        time.sleep(0.5)
        return real(self, state)

    HostCopy.take = slow
    engine, _ = make(ep_size)
    writer = writer_for(engine, folder, ep_size, background=background)
    for step in (2, 4):
        train(engine, 2, step - 2, writer)
        writer.save(step)
    train(engine, 3, 4, writer)  # everything changes while the thread writes
    assert writer.complete()
    assert not writer.pending


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_the_state_at_its_step_though_training_went_on(tmp_path, background):
    run_ranks(2, train_while_saving, tmp_path / "beside", 2, background)
    for step in (2, 4):
        run_ranks(2, train_and_save, tmp_path / f"alone_{step}", 2, 2, step)
        same_state(tmp_path / f"alone_{step}" / f"step_{step}", tmp_path / "beside" / f"step_{step}")


def save_without_room(folder):
    import psutil

    engine, _ = make(1)
    train(engine, 1)
    real = psutil.virtual_memory
    psutil.virtual_memory = lambda: real()._replace(available=1000)
    writer = writer_for(engine, folder, 1)
    real_write, written = writer._write, []
    writer._write = lambda *work: (time.sleep(0.3), real_write(*work), written.append(True))
    writer.save(1)
    writer.before_update()
    thread_is_done = bool(written)  # it may not read what the next step changes
    train(engine, 1, 1)
    assert writer.complete()
    psutil.virtual_memory = real
    return thread_is_done


def test_where_memory_has_no_room_for_a_copy_the_save_is_waited_for(tmp_path):
    assert run_ranks(1, save_without_room, tmp_path / "a") == [True]
    run_ranks(1, train_and_save, tmp_path / "b", 1, 2, 1)
    same_state(tmp_path / "b" / "step_1", tmp_path / "a" / "step_1")


def save_with_a_full_disk_on_rank_1(folder):
    """Step 1 is saved; at step 2 rank 1's disk is full; step 3 is saved. Returns what `complete` said."""
    engine, _ = make(2)
    writer = writer_for(engine, folder, 2)
    outcomes = []
    real = manifest.HashedFile.write

    def full(self, data):
        self.error = OSError(28, "No space left on device")
        raise self.error

    for step in (1, 2, 3):
        train(engine, 1, step - 1)
        manifest.HashedFile.write = full if step == 2 and dist.get_rank() == 1 else real
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
    engine, _ = make(2)
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


def save_before_a_step(folder):
    engine, _ = make(2)
    save(engine, folder, 2, 0)
    return train(engine, 5)


def test_a_checkpoint_from_before_the_first_applied_step_goes_on_anywhere(tmp_path):
    losses = run_ranks(2, save_before_a_step, tmp_path)[0]
    for ranks, ep_size in ((1, 1), (2, 2)):
        (step, _), resumed = run_ranks(ranks, load_and_train, tmp_path / "step_0", ep_size, 2, 5)[0]
        assert step == 0
        torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="before a step was applied"):
        write_universal(open_source(tmp_path / "step_0"), tmp_path / "step_0", tmp_path / "universal")


# --- finding the one that holds -------------------------------------------------------------------------------------


def find_here(folder):
    """What is restored, or the problems, and the lines that are printed."""
    engine, first_expert = make(1, stage=1)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            found = restore_first_that_holds(engine, manifest.candidates(folder), first_expert)
            found = found and found.name
        except UserError as error:
            found = error.problems
    return found, said.getvalue().splitlines()


def test_all_ranks_pass_over_a_damaged_checkpoint_together(tmp_path, saved):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved / "4x2" / "step_3", folder / "step_3")
    shutil.copytree(saved / "4x2" / "step_3", folder / "step_4")
    (folder / "latest").write_text("step_4")
    assert run_ranks(4, find_here, folder) == [("step_4", [])] * 4
    path = folder / "step_4" / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    path.write_bytes(data)
    (found, (line,)), *others = run_ranks(4, find_here, folder)
    assert found == "step_3"
    assert others == [("step_3", [])] * 3  # one rank speaks
    assert line.startswith(f"passed over {folder / 'step_4'}: {path} has not the SHA-256")
    (folder / "step_3" / "mp_rank_00_model_states.pt").unlink()
    (problems, _), (same_problems, _) = run_ranks(2, find_here, folder)  # none holds
    assert problems == same_problems
    assert "mp_rank_00_model_states.pt is missing" in problems[0]
    assert run_ranks(2, find_here, tmp_path / "nothing") == [(None, [])] * 2


def files_of_rank(ep_size):
    engine, _ = make(ep_size)
    train(engine, 1)
    return sorted(engine_files(engine))


def test_the_files_are_those_that_deepspeed_names(tmp_path):
    names = run_ranks(2, files_of_rank, 2)
    run_ranks(2, save_by_deepspeed, tmp_path, 2)
    written = {path.name for path in (tmp_path / "step_3").iterdir()}
    assert set(names[0]) | set(names[1]) == written
    assert not set(names[0]) & set(names[1])  # each is written by one rank
