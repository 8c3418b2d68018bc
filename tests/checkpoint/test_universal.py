"""DeepSpeed's Universal Checkpoint: made of a checkpoint, and read by DeepSpeed's own loader and by ours."""

import itertools
import json
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from engines import EXPERTS, GATED, load_and_train, make, plain_state, same_state, train, train_and_save
from indexed import KINDS, flip_bit, write
from ranks import run_ranks
from refusals import has, refusal

from megamoe.checkpoint import verify
from megamoe.checkpoint.engine_state import rank_state
from megamoe.checkpoint.index import BUFFER, read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.opening import open_source, run_record
from megamoe.checkpoint.universal import write_universal
from megamoe.config.optimizers import MASTERS
from megamoe.formats.source import load_buffers
from megamoe.model.decoder import Decoder

EXPERTS_OF_A_GROUP = 25_000  # elements: then one rank alone has more groups than each of those that saved


@pytest.fixture(scope="module")
def universal(tmp_path_factory):
    """(out, checkpoint, losses): made of what 4 ranks x ep_size 2 have saved at step 3; the losses of the 4 steps
    after."""
    folder = tmp_path_factory.mktemp("universal")
    (_, losses), *_ = run_ranks(4, partial(train_and_save, config=GATED), folder, 2, 2, 3, 4)
    checkpoint, out = folder / "step_3", folder / "out" / "step_3"
    write_universal(open_source(checkpoint), run_record(checkpoint), out)
    (out.parent / "latest_universal").write_text("step_3")
    return out, checkpoint, losses


def test_the_universal_layout_holds_the_same_state_in_a_folder_for_each_parameter_of_an_engine(universal):
    out, checkpoint, _ = universal
    same_state(checkpoint, out)
    assert verify.problems(out) == []
    assert run_record(out) == run_record(checkpoint)
    assert run_record(out)["model"]
    shapes = {name: one.shape for name, one in Decoder(GATED).named_parameters()}  # as one rank alone has it
    assert {path.name for path in (out / "zero").iterdir() if path.is_dir()} == shapes.keys()
    for name, shape in shapes.items():
        for kind in KINDS:
            saved = torch.load(out / "zero" / name / f"{kind}.pt", weights_only=True)
            assert saved.pop("param").shape == shape
            assert saved == ({"is_expert_param": True, "ep_num_experts": EXPERTS} if len(shape) == 3 else {})
    # fp32, two moments and step of each; beside them the main file, that of the optimizer and the record.
    assert len(json.loads((out / "manifest.json").read_text())["files"]) == len(shapes) * 4 + 3
    files = list((out / "zero").rglob("*.pt"))
    size = 3 * 4 * sum(map(math.prod, shapes.values()))
    assert sum(path.stat().st_size for path in files) < size + 4096 * len(files)  # each value once


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 2)])
def test_the_universal_layout_goes_on_at_any_ep_size(universal, ranks, ep_size):
    out, _, losses = universal
    _, resumed = run_ranks(ranks, partial(load_and_train, config=GATED), out, ep_size, 2, 4)[0]
    torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)


SPLIT = "megamoe.training.engine.split_params_into_different_moe_groups_for_optimizer"


def load_by_deepspeed(folder, checkpoint, ep_size, most):
    """What this rank then holds, compared with `checkpoint`; returns the rates, and the losses of four more steps.

    Args:
        most: elements in a group of experts.
    """
    split = partial(split_params_into_different_moe_groups_for_optimizer, max_group_size=most)
    with patch(SPLIT, split):
        engine = make(ep_size, seed=99, config=GATED, unchecked={"checkpoint": {"load_universal": True}})
    path, _ = engine.load_checkpoint(str(folder), tag="step_3")
    assert path
    source = open_source(checkpoint)
    groups = [group for group in rank_state(engine) if BUFFER not in group.tensors]
    for group in groups:
        for kind, one in itertools.product(group.tensors, group.stretches):
            held = group.tensors[kind][one.offset : one.offset + one.count]
            assert torch.equal(held, source.read(one.name, kind, one.start, one.count)), (one.name, kind)
    for name, weight in plain_state(engine.module).items():
        if name in source.shapes:
            assert torch.equal(weight.flatten(), source.read(name, MASTERS, 0, weight.numel())), name
    kinds = {kind for group in groups for kind in group.tensors}
    load_buffers(engine.module, source)  # DeepSpeed restores none from it
    names = [group["name"] for group in engine.optimizer.param_groups]
    return kinds, names, engine.get_lr(), train(engine, 4, engine.global_steps)


@pytest.mark.parametrize(("ranks", "ep_size", "most"), [(4, 4, 2**27), (1, 1, EXPERTS_OF_A_GROUP)])
def test_deepspeeds_own_universal_loader_gives_every_rank_its_experts_to_the_bit(universal, ranks, ep_size, most):
    out, checkpoint, losses = universal
    results = run_ranks(ranks, load_by_deepspeed, out.parent, checkpoint, ep_size, most)
    for kinds, names, rates, resumed in results:
        assert kinds == set(KINDS)
        assert set(names) == {"decayed", "undecayed", f"ep_size_{ep_size}"}
        assert len(names) > 3 if most == EXPERTS_OF_A_GROUP else len(names) == 3
        assert rates == pytest.approx([0.0075] * len(rates))  # 3/4 of the way up to 1e-2
        torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)
    assert losses[0] - losses[-1] > 0.1  # it learns, so the losses can tell


def test_a_dynamic_loss_scale_goes_along_and_deepspeeds_scaler_can_go_on_with_it(tmp_path):
    write(tmp_path / "step_3")
    fields = {"cur_scale": 2.0**16, "cur_iter": 9, "last_overflow_iter": 5, "scale_factor": 2.0, "scale_window": 1000,
              "min_scale": 1, "delayed_shift": 1, "cur_hysteresis": 1, "consecutive_hysteresis": False,
              "raise_error_at_min_scale": True, "dynamic": True}  # fmt: skip
    index = read_index(tmp_path / "step_3")
    index = index.model_copy(update={"training": index.training.model_copy(update={"loss_scaler": fields})})
    write_universal(IndexedFiles(tmp_path / "step_3", index), {}, tmp_path / "out" / "step_3")
    state = torch.load(tmp_path / "out" / "step_3" / "zero" / "optimizer_state.pt", weights_only=False)
    assert state["dynamic_loss_scale"] is True
    (scale,) = run_ranks(1, overflow, state["loss_scaler"])
    assert scale == 2.0**15
    assert open_source(tmp_path / "out" / "step_3").training_state()["loss_scaler"] == fields


def overflow(scaler):
    """The loss scale after an overflow, which DeepSpeed's scaler logs."""
    scaler.update_scale(True)
    return scaler.cur_scale


def test_a_damaged_source_leaves_no_output(tmp_path):
    write(tmp_path / "step_3")
    path = tmp_path / "step_3" / "rank_00001.safetensors"
    flip_bit(path, read_index(path.parent).files[path.name].slices[-1].tensors["exp_avg_sq"].offset)
    has(refusal(write_universal, open_source(path.parent), {}, tmp_path / "out"), str(path), "SHA-256")
    assert [one.name for one in tmp_path.iterdir()] == ["step_3"]
