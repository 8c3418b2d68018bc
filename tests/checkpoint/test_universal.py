"""DeepSpeed's Universal Checkpoint: made of form 2 and of form 1, and read by DeepSpeed's own loader and by ours."""

import json
import math
import shutil

import pytest
import torch
from engines import load_and_train, make, same_state, save, train
from form_1 import seal
from indexed import KINDS, SHAPES, values, write
from ranks import run_ranks
from refusals import has, refusal

from megamoe.checkpoint import manifest, verify
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.reader import load_buffers, open_source, run_record
from megamoe.checkpoint.universal import write_universal


def save_twice(folder):
    """Save the same engine by DeepSpeed and by megamoe; returns the losses of the five steps that follow."""
    engine = make(2)
    train(engine, 3)
    engine.save_checkpoint(str(folder / "1"), tag="step_3")
    save(engine, folder / "2", 3)
    return train(engine, 5, 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of forms 1 and 2, saved at step 3 by 4 ranks x ep_size 2, with the losses of the 5 steps after."""
    folder = tmp_path_factory.mktemp("trained")
    losses = run_ranks(4, save_twice, folder)[0]
    seal(folder / "1" / "step_3", run_record(folder / "2" / "step_3"))
    return folder, losses


@pytest.fixture(scope="module", params=["1", "2"], ids=["form 1", "form 2"])
def universal(request, trained):
    """Made of a checkpoint of that form, which comes along."""
    checkpoint = trained[0] / request.param / "step_3"
    out = trained[0] / f"of {request.param}" / "step_3"
    write_universal(open_source(checkpoint, open_files=1), run_record(checkpoint), out)
    (out.parent / "latest_universal").write_text("step_3")
    return out, checkpoint


def test_the_universal_layout_holds_the_same_state_and_a_manifest_that_verifies(universal):
    out, checkpoint = universal
    same_state(checkpoint, out)
    assert verify.problems(out) == []
    # fp32, two moments and step of each parameter; beside them the main file, that of the optimizer and the record.
    assert len(manifest.read_manifest(out)["files"]) == len(open_source(out).shapes) * 4 + 3
    assert run_record(out) == run_record(checkpoint)
    assert run_record(out)["model"]
    values = 3 * 4 * sum(math.prod(shape) for shape in open_source(out).shapes.values())
    files = list((out / "zero").rglob("*.pt"))
    assert sum(path.stat().st_size for path in files) < values + 4096 * len(files)  # each value once


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 2)])
def test_the_universal_layout_goes_on_at_any_ep_size(trained, universal, ranks, ep_size):
    _, resumed = run_ranks(ranks, load_and_train, universal[0], ep_size, 2, 5)[0]
    torch.testing.assert_close(resumed, trained[1], atol=1e-5, rtol=0)


def load_by_deepspeed(folder, tag, steps):
    engine = make(1, seed=99, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    assert path
    load_buffers(engine.module, open_source(folder / tag))  # DeepSpeed restores none from it
    return engine.get_lr(), train(engine, steps, engine.global_steps)


@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeeds_own_universal_loader_reads_it_at_an_ep_size_of_1(trained, universal, ranks):
    rates, resumed = run_ranks(ranks, load_by_deepspeed, universal[0].parent, "step_3", 5)[0]
    assert rates == pytest.approx([0.0075] * len(rates))  # 3/4 of the way up to 1e-2
    torch.testing.assert_close(resumed, trained[1], atol=1e-5, rtol=0)
    assert trained[1][0] - trained[1][-1] > 0.1  # it learns, so the losses can tell


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
