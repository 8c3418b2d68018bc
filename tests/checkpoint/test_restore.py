"""Over real ranks: any topology to any other, every precision and optimizer, and the checkpoint that is verified."""

import contextlib
import io
import json
import math
import os
import shutil
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from engines import load_and_train, make, plain_state, same_state, save, train, train_and_save, writer_for
from indexed import flip_bit
from ranks import run_ranks
from refusals import has, only, sentences
from toy import SHIPPED

from megamoe.checkpoint import folders, restore
from megamoe.checkpoint.engine_state import rank_state
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.reader import find_checkpoint, open_source
from megamoe.checkpoint.restore import first_verified, restore_first_verified
from megamoe.checkpoint.slice_file import SliceFile
from megamoe.checkpoint.universal import write_universal
from megamoe.config import read_json
from megamoe.errors import UserError
from megamoe.model.names import is_buffer

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
    for ranks, saved_ep_size, _ in SAVED:
        name = f"{ranks}x{saved_ep_size}"
        assert restore_first_verified(engine, [saved / name / "step_3"])
        save(engine, out / name, 3)
        source = open_source(out / name / "step_3")
        masters = {
            weight: source.read(weight, "fp32", 0, math.prod(shape)).view(shape)
            for weight, shape in source.shapes.items()
        }
        # The weights that the next forward pass uses are the restored ones, on every rank.
        for weight, value in plain_state(engine.module).items():
            assert is_buffer(weight) or torch.equal(value, masters[weight]), weight


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


# --- every precision and optimizer ----------------------------------------------------------------------------------

OFFLOAD = {key: read_json(SHIPPED / "zero2_offload.json")[key] for key in ("bf16", "data_types", "zero_optimization")}
LION = {"optimizer": {"type": "Lion", "params": {"weight_decay": 0.05}}}
RECIPES = {
    "ZeRO-1, fp32": (1, {}),
    "ZeRO-2, fp32": (2, {}),
    "ZeRO-1, bf16": (1, {"bf16": {"enabled": True}}),
    "ZeRO-2, bf16": (2, {"bf16": {"enabled": True}}),
    "ZeRO-1, fp16": (1, {"fp16": {"enabled": True, "loss_scale": 128}}),
    "ZeRO-2, fp16": (2, {"fp16": {"enabled": True, "loss_scale": 128}}),
    "AdamW, offloaded": (2, {**OFFLOAD, "optimizer": {"type": "AdamW", "params": {}}}),
    "Lion, offloaded": (2, {**OFFLOAD, **LION}),
}


def save_and_resume(folder, stage, ds):
    """Losses of the eight steps behind a save, and of the same steps after a resume on the same ranks, of a new engine
    and of the one that had trained them."""
    # DeepSpeed does not ask torch, which has every operation in fp16, but for the speed of the processor.
    with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        engine = make(2, stage, **ds)
        train(engine, 3)
        save(engine, folder, 3)
        losses = train(engine, 8, 3)
        assert restore_first_verified(engine, [folder / "step_3"])
        again = train(engine, 8, 3)
        _, resumed = load_and_train(folder / "step_3", 2, stage, 8, **ds)
    return losses, resumed, again


def resave(checkpoint, out, ep_size, stage, ds):
    with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        load_and_train(checkpoint, ep_size, stage, resave=out, **ds)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resume_on_the_same_topology_gives_the_same_losses_to_the_bit_and_on_another_the_same_state(tmp_path, recipe):
    stage, ds = RECIPES[recipe]
    losses, resumed, again = run_ranks(2, save_and_resume, tmp_path / "run", stage, ds)[0]
    if recipe == "AdamW, offloaded":  # DeepSpeed's CPU Adam computes its bias correction anew
        assert resumed == pytest.approx(losses, abs=1e-3)
        assert again == pytest.approx(losses, abs=1e-3)
    else:
        assert resumed == again == losses
    assert losses[0] - losses[-1] > 0.1  # it learns, so the losses can tell
    checkpoint = tmp_path / "run" / "step_3"
    assert read_index(checkpoint).training.skipped_steps == 0
    others = [(1, 1, 2)] if "offloaded" in recipe else [(1, 1, 3 - stage), (4, 2, stage)]
    for ranks, ep_size, other_stage in others:
        run_ranks(ranks, resave, checkpoint, tmp_path / str(ranks), ep_size, other_stage, ds)
        same_state(checkpoint, tmp_path / str(ranks) / "step_3")


# --- counters -------------------------------------------------------------------------------------------------------


def save_before_a_step(folder):
    engine = make(2)
    save(engine, folder, 0)
    losses = train(engine, 5)
    assert restore_first_verified(engine, [folder / "step_0"])
    assert train(engine, 5) == losses
    return losses


def test_before_the_first_applied_step_there_are_no_moments_and_a_resume_goes_on_anywhere(tmp_path):
    losses = run_ranks(2, save_before_a_step, tmp_path)[0]
    index = read_index(tmp_path / "step_0")
    assert (index.optimizer.state, index.optimizer.step) == ([], None)
    kinds = {kind for file in index.files.values() for piece in file.slices for kind in piece.tensors}
    assert kinds == {"fp32", "buffer"}
    for ranks, ep_size in ((1, 1), (2, 2)):
        (step, _), resumed = run_ranks(ranks, load_and_train, tmp_path / "step_0", ep_size, 2, 5)[0]
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
    opened, indexes = [], []
    real_init, real_read = SliceFile.__init__, read_index
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(
            SliceFile, "__init__", lambda self, path, *args: (opened.append(path.name), real_init(self, path, *args))[1]
        )
        patching.setattr(restore, "read_index", lambda path: (indexes.append(path), real_read(path))[1])
        patching.setattr(restore, "open_source", None)  # that of other forms reads the index too
        assert restore_first_verified(engine, [checkpoint])
    values = {(piece.name, piece.start + at) for piece in rank_state(engine).slices for at in range(piece.count)}
    holding = {
        file
        for file, record in read_index(checkpoint).files.items()
        for piece in record.slices
        if any((piece.name, piece.start + at) in values for at in range(piece.count))
    }
    return sorted(opened), sorted(holding), len(indexes)


@pytest.mark.parametrize(("ranks", "ep_size"), [(8, 8), (4, 4), (2, 1)])
def test_a_rank_opens_the_files_that_hold_its_slices_once_and_rank_0_alone_the_index(saved, ranks, ep_size):
    results = run_ranks(ranks, open_counted, saved / "8x8" / "step_3", ep_size)
    assert [indexes for _, _, indexes in results] == [1] + [0] * (ranks - 1)
    for rank, (opened, holding, _) in enumerate(results):
        # Rank 0 reads the router statistics for all.
        assert opened == (holding if rank else sorted([*holding, "rank_00000.safetensors"]))
        if ranks == 8:
            assert set(opened) == {f"rank_{rank:05d}.safetensors"}
    assert ranks == 2 or all(len(opened) < 8 for opened, _, _ in results)


# --- finding the one that is verified -------------------------------------------------------------------------------


def find_here(folder, weights_only=False):
    """What is restored, or the problems, and the lines that are printed; the same without an engine."""
    engine = make(1, stage=1)
    attempts = [lambda paths: restore_first_verified(engine, paths, weights_only), first_verified]
    answers = []
    for attempt in attempts:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                found = attempt(folders.step_folders(folder))
                found = found and found.name
            except UserError as error:
                found = error.problems
        answers.append((found, said.getvalue().splitlines()))
    assert answers[0] == answers[1]
    return answers[0]


def find_on(ranks, folder, weights_only=False):
    """(what is found, the lines about others), which all ranks agree on and one of them says."""
    (found, lines), *others = run_ranks(ranks, find_here, folder, weights_only)
    assert others == [(found, [])] * (ranks - 1)
    return found, sentences(lines)


def save_steps(folder, run_id, steps):
    """Save a checkpoint at each of these steps into the folder of a run."""
    engine = make(2)
    writer = writer_for(engine, folder)
    writer.record["run_id"] = run_id
    done = 0
    for step in steps:
        train(engine, step - done, done)
        done = step
        writer.save(step, hold=True)
        assert writer.complete()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a run of 2 ranks with checkpoints at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, save_steps, folder / "checkpoints", "mine", [3, 6])
    (folder / "run.json").write_text(json.dumps({"run_id": "mine"}))
    return folder


@pytest.fixture
def checkpoints(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run") / "checkpoints"


def flip_in(checkpoint, kind):
    """Flip a bit in a tensor of that kind in the file of rank 1; returns the file."""
    index = read_index(checkpoint)
    piece = next(one for one in index.files["rank_00001.safetensors"].slices if kind in one.tensors)
    flip_bit(checkpoint / "rank_00001.safetensors", piece.tensors[kind].offset + 1, 4)
    return checkpoint / "rank_00001.safetensors"


def test_all_ranks_pass_over_a_damaged_checkpoint_together(checkpoints):
    assert find_on(2, checkpoints) == ("step_6", [])
    path = flip_in(checkpoints / "step_6", "exp_avg")
    found, (line,) = find_on(2, checkpoints)
    assert found == "step_3"
    assert line.startswith(f"passed over {checkpoints / 'step_6'}: {path} has not the SHA-256")
    (checkpoints / "step_3" / "rank_00000.safetensors").unlink()
    problems, lines = find_on(2, checkpoints)  # none is verified
    assert len(lines) == 2
    has(only(sentences(problems)), str(checkpoints / "step_3" / "rank_00000.safetensors"), "is missing")
    assert find_on(2, checkpoints.parent / "nothing") == (None, [])


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "fp32"])
def test_a_restore_of_weights_alone_verifies_the_optimizers_state_too(checkpoints, kind):
    path = flip_in(checkpoints / "step_6", kind)
    found, (line,) = find_on(3, checkpoints, weights_only=True)
    assert found == "step_3"
    has(line, str(path), "SHA-256")


def test_a_script_or_an_index_that_has_changed_is_found_on_resume(checkpoints):
    with open(checkpoints / "step_6" / "zero_to_fp32.py", "a") as file:
        file.write("import os\n")
    has(only(find_on(2, checkpoints)[1]), "step_6", "zero_to_fp32.py")
    flip_bit(checkpoints / "step_3" / "index.json", 200)
    assert "index.json" in find_on(2, checkpoints)[0][0]


def exchange(one, other):
    one.rename(one.with_name("away"))
    other.rename(one)
    one.with_name("away").rename(other)


@pytest.mark.parametrize(
    ("change", "says", "found"),
    [
        (lambda folder: exchange(folder / "step_3", folder / "step_6"), "of step 3, but its folder is called", None),
        (lambda folder: shutil.copytree(folder / "step_6", folder / "step_9"), "is called step_9", "step_6"),
        (lambda folder: (folder / "step_9").symlink_to("step_6"), "is called step_9", "step_6"),
        (lambda folder: (folder / "step_6").rename(folder / "step_7.1"), "is called step_7.1", "step_3"),
        (lambda folder: (folder / "step_8").mkdir(), "was not saved completely, for it has no index.json", "step_6"),
        (lambda folder: (folder / "step_6" / "index.json").unlink(), "was not saved completely", "step_3"),
    ],
    ids=["exchanged", "copied", "linked", "moved", "empty", "without index"],
)  # fmt: skip
def test_what_is_not_the_checkpoint_of_its_name_is_passed_over_with_a_sentence(
    checkpoints, capsys, change, says, found
):
    change(checkpoints)
    answer, lines = find_on(2, checkpoints)
    has(lines[0], "passed over", says)
    if found is None:  # both have the name of the other
        assert len(answer) == 1
        with pytest.raises(UserError, match="every checkpoint"):
            find_checkpoint(checkpoints.parent)
    else:
        assert answer == found
        assert find_checkpoint(checkpoints.parent).name == found
    assert capsys.readouterr().out.splitlines() == lines


def test_a_checkpoint_of_another_run_that_lies_in_the_folder_is_passed_over(checkpoints, capsys, tmp_path):
    run_ranks(1, save_one_of_another_run, tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "step_9", checkpoints / "step_9")
    answer, lines = find_on(2, checkpoints)
    assert answer == "step_6"
    has(only(lines), "step_9", "it is of the run another, but lies in the folder of the run mine")
    assert find_checkpoint(checkpoints.parent).name == "step_6"
    assert capsys.readouterr().out.splitlines() == lines


def save_one_of_another_run(folder):
    engine = make(1)
    writer = writer_for(engine, folder)
    writer.record["run_id"] = "another"
    writer.save(9, hold=True)
    assert writer.complete()


def restore_from_a_disk_in_trouble(newest_first):
    """What becomes of a resume for which rank 1's disk gives nothing at the moment."""
    engine = make(2, seed=99)

    def fail(*args):
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patching:
        if dist.get_rank() == 1:
            patching.setattr(os, "preadv", fail)
        try:
            restore_first_verified(engine, newest_first)
        except OSError as error:
            return str(error)
    return None


def test_a_disk_in_trouble_ends_a_resume_on_all_ranks_and_does_not_send_it_to_an_older_checkpoint(tmp_path):
    for step in (2, 3):
        run_ranks(2, train_and_save, tmp_path / str(step), 2, 2, step)
    paths = [tmp_path / "3" / "step_3", tmp_path / "2" / "step_2"]
    said = run_ranks(2, restore_from_a_disk_in_trouble, paths)
    assert said == [f"{paths[0]} cannot be read now (Input/output error)"] * 2
