"""Checkpoints over real ranks: any topology to any other, and the one that holds."""

import contextlib
import io
import math
import shutil

import pytest
import torch
from engines import (
    load_and_train,
    make,
    same_state,
    save,
    train,
    train_and_save,
)
from ranks import run_ranks

from megamoe.checkpoint import manifest
from megamoe.checkpoint.export import write_universal
from megamoe.checkpoint.reader import open_source
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.errors import UserError
from megamoe.model.names import is_buffer, plain_name

# --- any topology to any other --------------------------------------------------------------------------------------

SAVED = [(1, 1, 1), (2, 2, 2), (4, 2, 2), (8, 8, 1)]  # ranks, ep_size, ZeRO stage
LOADED = [(1, 1, 2), (2, 1, 2), (2, 2, 1), (4, 2, 1), (4, 4, 2), (8, 4, 2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each of SAVED, with moments that differ from weight to weight."""
    folder = tmp_path_factory.mktemp("saved")
    for ranks, ep_size, stage in SAVED:
        run_ranks(ranks, train_and_save, folder / f"{ranks}x{ep_size}", ep_size, stage)
    return folder


def resave_all(saved, out, ep_size, stage):
    """Restore every saved checkpoint into one engine, one after the other, and save each again."""
    engine = make(ep_size, stage, seed=99)
    first_expert = engine.module.topology.first_expert
    for ranks, saved_ep_size, _ in SAVED:
        name = f"{ranks}x{saved_ep_size}"
        assert restore_first_verified(engine, [saved / name / "step_3"])
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


@pytest.mark.parametrize(("ranks", "ep_size", "stage"), [(1, 1, 2), (2, 1, 1), (4, 4, 1)])
def test_on_another_topology_the_next_50_losses_are_equal_to_rounding(long_run, ranks, ep_size, stage):
    checkpoint, losses = long_run
    (step, rates), resumed = run_ranks(ranks, load_and_train, checkpoint, ep_size, stage, 50)[0]
    assert step == 3
    assert rates == pytest.approx([0.0075] * len(rates))  # 3/4 of the way up to 1e-2
    assert len(resumed) == 50
    assert losses[0] - losses[-1] > 1  # it learns, so the losses can tell
    torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)


BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(("ranks", "stage", "precision"), [(2, 1, {}), (2, 2, {}), (4, 1, BF16), (4, 2, BF16)])
def test_on_the_same_topology_the_next_losses_are_the_same_to_the_bit(tmp_path, ranks, stage, precision):
    losses, resumed = run_ranks(ranks, save_and_resume, tmp_path, stage, precision)[0]
    assert resumed == losses


def save_and_resume(folder, stage, precision):
    _, losses = train_and_save(folder, 2, stage, 3, 8, **precision)
    _, resumed = load_and_train(folder / "step_3", 2, stage, 8, **precision)
    return losses, resumed


def save_before_a_step(folder):
    engine = make(2)
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
    engine = make(1, stage=1)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            found = restore_first_verified(engine, manifest.candidates(folder))
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
