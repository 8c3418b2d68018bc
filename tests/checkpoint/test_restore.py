"""Over real ranks: any topology to any other, every precision and optimizer."""

import contextlib
import functools
import math
from unittest.mock import patch

import pytest
import torch
from cpuinfo import get_cpu_info
from deepspeed.accelerator import get_accelerator
from engines import (
    CONFIG,
    GATED,
    load_and_train,
    make,
    plain_state,
    same_state,
    save,
    train,
    train_and_save,
)
from model_parts import PARTS, model_of
from ranks import run_ranks
from toy import shipped

from megamoe.checkpoint import restore
from megamoe.checkpoint.engine_state import rank_state
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.opening import open_source
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.checkpoint.slice_file import SliceFile
from megamoe.checkpoint.universal import write_universal
from megamoe.config.optimizers import MASTERS
from megamoe.model.names import is_buffer
from megamoe.training.weight_average import WeightAverage
from megamoe.utils.errors import UserError

# --- any topology to any other --------------------------------------------------------------------------------------

SAVED = {"1x1": (1, 1, 1), "2x2": (2, 2, 2), "4x2": (4, 2, 2), "4x4": (4, 4, 1)}  # ranks, ep_size, ZeRO stage
LOADED = [(1, 1, 2), (2, 1, 2), (2, 2, 1), (4, 2, 1), (4, 4, 2)]
STEPS = {"1x1": 2, "2x2": 2, "4x2": 12, "4x4": 2}  # that follow each save


cpu_info = functools.cache(get_cpu_info)  # takes a second


@contextlib.contextmanager
def quick_checks():
    """DeepSpeed does not ask torch, which has every operation in fp16, but for the speed of the processor; and for its
    name before each operator."""
    with (
        patch.object(get_accelerator(), "is_fp16_supported", return_value=True),
        patch("cpuinfo.get_cpu_info", cpu_info),
    ):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder with a checkpoint of each of SAVED at step 3, the losses of the steps after each)."""
    folder, losses = tmp_path_factory.mktemp("saved"), {}
    for name, (ranks, ep_size, stage) in SAVED.items():
        (_, losses[name]), *_ = run_ranks(ranks, train_and_save, folder / name, ep_size, stage, 3, STEPS[name])
    return folder, losses


def restore_each(checkpoints, out, ep_size, stage, changes):
    """Restore each of these checkpoints into one engine, save it again and train the number of steps given for it;
    returns rates and losses of each."""
    results = []
    with quick_checks():
        engine = make(ep_size, stage, seed=99, **changes)  # other weights, so that a restore shows
        for checkpoint, steps in checkpoints.items():
            assert restore_first_verified(engine, [checkpoint])
            save(engine, out / checkpoint.parent.name, engine.global_steps)
            source = open_source(checkpoint)
            # The weights that the next forward pass uses are the restored ones, on every rank.
            for name, weight in plain_state(engine.module).items():
                if not is_buffer(name):
                    master = source.read(name, MASTERS, 0, weight.numel()).view(weight.shape)
                    assert torch.equal(weight, master.to(weight.dtype)), name
            scaler = vars(engine.optimizer.loss_scaler)
            assert scaler.items() >= source.training_state()["loss_scaler"].items()
            results.append((engine.get_lr(), train(engine, steps, engine.global_steps)))
    return results


@pytest.mark.parametrize(("ranks", "ep_size", "stage"), LOADED)
def test_every_saved_topology_goes_on_on_every_other_as_it_was_saved(tmp_path, saved, ranks, ep_size, stage):
    folder, losses = saved
    checkpoints = {folder / name / "step_3": STEPS[name] for name in SAVED}
    results = run_ranks(ranks, restore_each, checkpoints, tmp_path, ep_size, stage, {})[0]
    for (name, expected), (rates, resumed) in zip(losses.items(), results, strict=True):
        same_state(folder / name / "step_3", tmp_path / name / "step_3")
        saved_on = read_index(tmp_path / name / "step_3").topology
        assert (saved_on.world_size, saved_on.ep_size, saved_on.zero_stage) == (ranks, ep_size, stage)
        assert rates == pytest.approx([0.0075] * len(rates))  # 3/4 of the way up to 1e-2
        torch.testing.assert_close(resumed, expected, atol=1e-5, rtol=0)
    assert losses["4x2"][0] - losses["4x2"][-1] > 0.5  # it learns, so the losses can tell


# --- every precision, optimizer and part of a model ------------------------------------------------------------------

OFFLOAD = {key: shipped("zero2_offload")[key] for key in ("bf16", "data_types", "zero_optimization")}
FP16 = {"enabled": True, "initial_scale_power": 7, "loss_scale_window": 2}  # so that the scale has changed at the save
LION = {"optimizer": {"type": "Lion", "params": {"weight_decay": 0.05}}}
MUON = {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "weight_decay": 0.05}}}
GROUPED = model_of(
    "gated_shared_experts",
    **PARTS["full_norm_out_bias"] | PARTS["untied_multi_token"] | PARTS["global_loss"],
    **{"first_k_dense_replace": 1, "gated_mlp": True, "attention_bias": True},
)
LATENT = model_of(
    "compressed_queries",
    **PARTS["sigmoid_groups"] | PARTS["shared_experts"] | PARTS["sequence_loss"],
    **{"first_k_dense_replace": 1, "moe_intermediate_size": 16, "tie_word_embeddings": False},
)
# Config and ZeRO stage of the two ranks that save; (ranks, ep_size, stage) of those that restore. Together: each stage
# in each precision, saved or restored, and to more and to fewer ranks.
RECIPES = {
    "fp32": (GROUPED, 2, {}, (1, 1, 1)),
    "bf16": (LATENT, 1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, (4, 4, 2)),
    "fp16": (GATED, 2, {"fp16": FP16}, (4, 2, 1)),
    "AdamW, offloaded": (CONFIG, 2, {**OFFLOAD, "optimizer": {"type": "AdamW", "params": {}}}, (1, 1, 2)),
    "Lion, offloaded": (CONFIG, 2, {**OFFLOAD, **LION}, (1, 1, 2)),
    "Muon": (CONFIG, 2, MUON, (4, 2, 2)),
}


def save_and_resume(folder, stage, changes):
    """Losses of the five steps behind a save, and of the same steps after a resume on the same ranks, of a new engine
    and of the one that had trained them."""
    with quick_checks():
        engine = make(2, stage, **changes)
        train(engine, 3)
        save(engine, folder, 3)
        losses = train(engine, 5, 3)
        assert restore_first_verified(engine, [folder / "step_3"])
        again = train(engine, 5, 3)
        _, resumed = load_and_train(folder / "step_3", 2, stage, 5, **changes)
    return losses, resumed, again


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resume_on_the_same_topology_gives_the_same_losses_to_the_bit_and_on_another_the_same_state(tmp_path, recipe):
    config, stage, ds, (ranks, ep_size, other_stage) = RECIPES[recipe]
    changes = {"config": config, **ds}
    losses, resumed, again = run_ranks(2, save_and_resume, tmp_path / "run", stage, changes)[0]
    if recipe == "AdamW, offloaded":  # DeepSpeed's CPU Adam computes its bias correction again
        assert resumed == pytest.approx(losses, abs=1e-3)
        assert again == pytest.approx(losses, abs=1e-3)
    else:
        assert resumed == again == losses
    assert losses[0] - losses[-1] > 0.1  # it learns, so the losses can tell
    checkpoint = tmp_path / "run" / "step_3"
    assert read_index(checkpoint).training.skipped_steps == 0
    goes_on = recipe in ("fp32", "Muon")  # the others are trained no further there
    out = tmp_path / "elsewhere"
    out.mkdir()
    steps = {checkpoint: 5 * goes_on}
    ((_, elsewhere),) = run_ranks(ranks, restore_each, steps, out, ep_size, other_stage, changes)[0]
    same_state(checkpoint, out / "run" / "step_3")
    assert elsewhere == pytest.approx(losses if goes_on else [], rel=1e-5)


# --- counters -------------------------------------------------------------------------------------------------------


def save_before_a_step(folder):
    engine = make(2)
    average = WeightAverage(engine, 0.9)
    save(engine, folder, 0)
    losses = train(engine, 4, average=average)
    assert restore_first_verified(engine, [folder / "step_0"])
    assert not average.has_begun
    assert train(engine, 4) == losses
    return losses


def test_before_the_first_applied_step_there_are_no_moments_and_a_resume_goes_on_anywhere(tmp_path):
    losses = run_ranks(2, save_before_a_step, tmp_path)[0]
    index = read_index(tmp_path / "step_0")
    assert (index.optimizer.state, index.optimizer.step) == ([], None)
    kinds = {kind for file in index.files.values() for piece in file.slices for kind in piece.tensors}
    assert kinds == {"fp32", "buffer"}
    (step, _), resumed = run_ranks(1, load_and_train, tmp_path / "step_0", 1, 2, 4)[0]
    assert step == 0
    torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="before a step was applied"):
        write_universal(open_source(tmp_path / "step_0"), {}, tmp_path / "universal")


def skip_two_steps(folder):
    """Of six steps the second and the third are skipped; returns the losses of the four behind the save."""
    engine = make(2)
    parameter = next(engine.module.parameters())
    train(engine, 1)
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    train(engine, 2, 1)
    handle.remove()
    train(engine, 3, 3)
    save(engine, folder, 6)
    return engine.get_lr(), train(engine, 4, 6)


def test_after_skipped_steps_the_schedule_that_stayed_behind_is_restored(tmp_path):
    rates, losses = run_ranks(2, skip_two_steps, tmp_path)[0]
    index = read_index(tmp_path / "step_6")
    assert (index.step, index.training.skipped_steps, index.training.scheduler.last_epoch) == (6, 2, 4)
    assert index.optimizer.step == 4
    for ranks, ep_size in ((2, 2), (1, 1)):
        (step, restored_rates), resumed = run_ranks(ranks, load_and_train, tmp_path / "step_6", ep_size, 2, 4)[0]
        assert step == 6
        assert set(restored_rates) == set(rates)
        torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)
        assert ranks == 1 or resumed == losses


# --- which files ----------------------------------------------------------------------------------------------------


def open_counted(checkpoint, ep_size):
    """Names of the files that this rank opens, of those that hold its slices, and how often it reads an index."""
    engine = make(ep_size, seed=99)
    with (
        patch.object(SliceFile, "__init__", autospec=True, side_effect=SliceFile.__init__) as opens,
        patch.object(restore, "read_index", side_effect=read_index) as reads,
        patch.object(restore, "open_source", None),  # that of other forms reads the index too
    ):
        assert restore_first_verified(engine, [checkpoint])
    stretches = [(one.name, one.start, one.count) for group in rank_state(engine) for one in group.stretches]
    holding = {
        file
        for file, record in read_index(checkpoint).files.items()
        for piece in record.slices
        for name, start, count in stretches
        if name == piece.name and start < piece.start + piece.count and piece.start < start + count
    }
    return sorted(call.args[1].name for call in opens.call_args_list), sorted(holding), reads.call_count


@pytest.mark.parametrize(("ranks", "ep_size"), [(4, 4), (2, 1)])
def test_a_rank_opens_the_files_that_hold_its_slices_once_and_rank_0_alone_the_index(saved, ranks, ep_size):
    results = run_ranks(ranks, open_counted, saved[0] / "4x4" / "step_3", ep_size)
    assert [indexes for _, _, indexes in results] == [1] + [0] * (ranks - 1)
    for rank, (opened, holding, _) in enumerate(results):
        # Rank 0 reads the router statistics for all.
        assert opened == (holding if rank else sorted([*holding, "rank_00000.safetensors"]))
        if ranks == 4:
            assert set(opened) == {f"rank_{rank:05d}.safetensors"}
