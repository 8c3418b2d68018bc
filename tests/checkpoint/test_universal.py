"""DeepSpeed's Universal Checkpoint: made of form 2 and of form 1, and read by DeepSpeed's own loader and by ours."""

import json
import math
import re
import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from engines import CONFIG, EXPERTS, GATED, load_and_train, make, plain_state, same_state, save, train
from form_1 import make_for_deepspeed, seal
from indexed import KINDS, SHAPES, values, write
from ranks import run_ranks
from refusals import has, refusal

from megamoe.checkpoint import manifest, verify
from megamoe.checkpoint.engine_state import rank_state
from megamoe.checkpoint.index import BUFFER, read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.opening import open_source, run_record
from megamoe.checkpoint.universal import write_universal
from megamoe.config.optimizers import MASTERS
from megamoe.formats.source import load_buffers
from megamoe.model.decoder import Decoder

TRAINED = {"form 1": (make_for_deepspeed, CONFIG), "form 2": (make, GATED)}


def train_and_save(folder, make_engine, config):
    """Save at step 3, in form 1 what DeepSpeed can save; returns the losses of the four steps that follow."""
    engine = make_engine(2, config=config)
    train(engine, 3)
    if make_engine is make_for_deepspeed:
        engine.save_checkpoint(str(folder), tag="step_3")
    else:
        save(engine, folder, 3)
    return train(engine, 4, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each of TRAINED (out, checkpoint, config, losses): made of what 4 ranks x ep_size 2 have saved at
    step 3, with the losses of the 4 steps after."""
    return {form: make_universal(tmp_path_factory.mktemp("universal"), form) for form in TRAINED}


def make_universal(folder, form):
    make_engine, config = TRAINED[form]
    losses = run_ranks(4, train_and_save, folder, make_engine, config)[0]
    checkpoint, out = folder / "step_3", folder / "out" / "step_3"
    if form == "form 1":
        seal(checkpoint, {"model": config.model_dump()})
    write_universal(open_source(checkpoint, open_files=1), run_record(checkpoint), out)
    (out.parent / "latest_universal").write_text("step_3")
    return out, checkpoint, config, losses


@pytest.fixture(params=TRAINED)
def universal(made, request):
    return made[request.param]


def test_the_universal_layout_holds_the_same_state_and_a_manifest_that_verifies(universal):
    out, checkpoint, _, _ = universal
    same_state(checkpoint, out)
    assert verify.problems(out) == []
    assert run_record(out) == run_record(checkpoint)
    assert run_record(out)["model"]
    values = 3 * 4 * sum(math.prod(shape) for shape in open_source(out).shapes.values())
    files = list((out / "zero").rglob("*.pt"))
    assert sum(path.stat().st_size for path in files) < values + 4096 * len(files)  # each value once


def test_it_has_a_folder_for_each_parameter_of_an_engine_that_holds_all_experts_with_deepspeeds_marks(universal):
    out, _, config, _ = universal
    shapes = {name: one.shape for name, one in Decoder(config).named_parameters()}  # as one rank alone has it
    assert {path.name for path in (out / "zero").iterdir() if path.is_dir()} == shapes.keys()
    # fp32, two moments and step of each; beside them the main file, that of the optimizer and the record.
    assert len(manifest.read_manifest(out)["files"]) == len(shapes) * 4 + 3
    for name, shape in shapes.items():
        for kind in KINDS:
            saved = torch.load(out / "zero" / name / f"{kind}.pt", weights_only=True)
            assert saved.pop("param").shape == shape
            assert saved == ({"is_expert_param": True, "ep_num_experts": EXPERTS} if len(shape) == 3 else {})


@pytest.mark.parametrize(
    ("universal", "ranks", "ep_size"), [("form 1", 1, 1), ("form 2", 2, 2)], indirect=["universal"]
)
def test_the_universal_layout_goes_on_at_any_ep_size(universal, ranks, ep_size):
    out, _, config, losses = universal
    _, resumed = run_ranks(ranks, load_and_train_as, config, out, ep_size)[0]
    torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)


def load_and_train_as(config, checkpoint, ep_size):
    return load_and_train(checkpoint, ep_size, steps=4, config=config)


def one_folder_per_expert(universal, out):
    """As the versions before the experts were stacked wrote it."""
    shutil.copytree(universal, out)
    for folder in (out / "zero").glob("*.experts.*"):
        for path in folder.iterdir():
            content = torch.load(path, weights_only=True)
            for expert in range(EXPERTS):
                name = re.sub(r"experts\.(\w+)$", rf"experts.deepspeed_experts.{expert}.\1_proj.weight", folder.name)
                (out / "zero" / name).mkdir(exist_ok=True)
                one = content if path.stem == "step" else {"param": content["param"][expert].clone()}
                torch.save(one, out / "zero" / name / path.name)
        shutil.rmtree(folder)
    (out / "manifest.json").unlink()  # it names the folders
    (out / "run.json").unlink()  # else it would be missing
    return out


@pytest.mark.parametrize("universal", ["form 1"], indirect=True)
def test_one_with_a_folder_for_each_expert_as_versions_before_wrote_it_is_read(universal, tmp_path):
    out, checkpoint, _, _ = universal
    before = one_folder_per_expert(out, tmp_path / "step_3")
    assert len(list((before / "zero").glob("*.deepspeed_experts.*"))) == 2 * 2 * EXPERTS
    same_state(checkpoint, before)


# --- DeepSpeed's own loader -----------------------------------------------------------------------------------------

SPLIT = "megamoe.training.engine.split_params_into_different_moe_groups_for_optimizer"


def load_by_deepspeed(folder, checkpoint, config, ep_size, most):
    """What this rank then holds, compared with `checkpoint`; returns the rates, and the losses of four more steps.

    Args:
        most: elements in a group of experts.
    """
    split = partial(split_params_into_different_moe_groups_for_optimizer, max_group_size=most)
    with patch(SPLIT, split):
        engine = make(ep_size, seed=99, config=config, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(str(folder), tag="step_3")
    assert path
    source = open_source(checkpoint)
    state = rank_state(engine)
    for piece in state.slices:
        for kind, number in piece.tensors.items():
            if kind != BUFFER:
                held = state.tensors[number][piece.offset : piece.offset + piece.count]
                assert torch.equal(held, source.read(piece.name, kind, piece.start, piece.count)), (piece.name, kind)
    for name, weight in plain_state(engine.module).items():
        if name in source.shapes:
            assert torch.equal(weight.flatten(), source.read(name, MASTERS, 0, weight.numel())), name
    kinds = {kind for piece in state.slices for kind in piece.tensors}
    load_buffers(engine.module, source)  # DeepSpeed restores none from it
    names = [group["name"] for group in engine.optimizer.param_groups]
    return kinds - {BUFFER}, names, engine.get_lr(), train(engine, 4, engine.global_steps)


@pytest.mark.parametrize(
    ("universal", "ranks", "ep_size", "most"),
    [("form 1", 2, 2, 2**27), ("form 1", 1, 1, 25_000), ("form 2", 4, 4, 2**27), ("form 2", 1, 1, 2**27)],
    ids=["form 1, 2", "form 1, 1, with more groups than were saved", "form 2, 4", "form 2, 1"],
    indirect=["universal"],
)
def test_deepspeeds_own_universal_loader_gives_every_rank_its_experts_to_the_bit(universal, ranks, ep_size, most):
    out, checkpoint, config, losses = universal
    results = run_ranks(ranks, load_by_deepspeed, out.parent, checkpoint, config, ep_size, most)
    for kinds, names, rates, resumed in results:
        assert kinds == set(KINDS)
        assert set(names) == {"decayed", "undecayed", f"ep_size_{ep_size}"}
        assert len(names) > 3 if most == 25_000 else len(names) == 3
        assert rates == pytest.approx([0.0075] * len(rates))  # 3/4 of the way up to 1e-2
        torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)
    assert losses[0] - losses[-1] > 0.1  # it learns, so the losses can tell


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("universal", ["form 2"], indirect=True)
def test_a_damaged_universal_checkpoint_is_found(universal, tmp_path):
    checkpoint = shutil.copytree(universal[0], tmp_path / "step_3")
    path = next((checkpoint / "zero").glob("*/exp_avg.pt"))
    path.write_bytes(path.read_bytes()[:-1])
    assert [str(path) in problem for problem in verify.problems(checkpoint)] == [True]


# --- without an engine ----------------------------------------------------------------------------------------------


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


def test_every_value_is_there_once_in_its_shape(tmp_path):
    write(tmp_path / "step_3")
    run = {"deepspeed": {"gradient_clipping": 0.5}, "versions": {"deepspeed": "0.19"}}
    write_universal(open_source(tmp_path / "step_3"), run, tmp_path / "out")
    for name, shape in SHAPES.items():
        for kind in KINDS:
            found = torch.load(tmp_path / "out" / "zero" / name.removeprefix("model.") / f"{kind}.pt")["param"]
            assert found.shape == shape
            assert found.flatten().tolist() == values(name, kind).tolist()
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == run
    assert torch.load(tmp_path / "out" / "zero" / "optimizer_state.pt", weights_only=False)["clip_grad"] == 0.5


def test_a_damaged_source_leaves_no_output(tmp_path):
    index = write(tmp_path / "step_3")
    path = tmp_path / "step_3" / "rank_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[index.files[path.name].slices[-1].tensors["exp_avg_sq"].offset] ^= 1
    path.write_bytes(data)
    has(refusal(write_universal, open_source(tmp_path / "step_3"), {}, tmp_path / "out"), str(path), "SHA-256")
    assert [one.name for one in tmp_path.iterdir()] == ["step_3"]
