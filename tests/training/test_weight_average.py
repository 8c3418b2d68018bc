"""The average of the weights against one in numpy, in checkpoints, in tools, and next to the weights in evaluations."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from corpora import write_record
from engines import make, plain_state, same_state, save, train
from indexed import flip_bit
from ranks import run_ranks
from refusals import has, only, refusals
from toy import losses, run_and_hear, shipped, train_here, write_inputs

import megamoe
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.opening import open_source
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.checkpoint.universal import write_universal
from megamoe.model.names import is_buffer
from megamoe.training.weight_average import WeightAverage

DECAY, STEPS = 0.3, 5  # the ramp reaches it at step 3
SKIPPED = 3  # the step that is; the average is not that of the first weights any more


def expected_average(weights):
    """Of the weights after each step, by step, in float64."""
    (_, first), *others = sorted(weights.items())
    average = first.astype(np.float64)
    for step, values in others:
        decay = min(DECAY, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * values
    return average


def flat_masters(engine):
    return [master.detach().float().numpy().copy() for master in engine.optimizer.single_partition_of_fp32_groups]


def flat_averages(engine):
    zero = engine.optimizer
    return [zero.optimizer.state[master]["ema"] for master in zero.single_partition_of_fp32_groups]


def weights_of(engine):
    """By plain name, without the router statistics."""
    state = plain_state(engine.module)
    return {name: value.float().numpy().copy() for name, value in state.items() if not is_buffer(name)}


def skip_a_step(engine, average, step):
    """A step whose gradients are not finite, on which nothing is applied."""
    handle = next(engine.module.parameters()).register_hook(lambda gradient: gradient * math.inf)
    train(engine, 1, step, average=average)
    handle.remove()
    assert engine.skipped_steps == 1


def averaged_run(folder, ep_size, changes):
    """Train with an average; returns what this rank holds: its flat masters by step, its flat averages, the model's
    weights, those with the average in the model, and those after it."""
    engine = make(ep_size, **changes)
    average = WeightAverage(engine, DECAY)
    masters = {}
    assert not average.has_begun
    for step in range(1, STEPS + 1):
        if step == SKIPPED:
            before = [one.clone() for one in flat_averages(engine)]
            skip_a_step(engine, average, step)
            assert all(map(torch.equal, before, flat_averages(engine)))
            continue
        train(engine, 1, step, average=average)
        masters[step] = flat_masters(engine)
    weights = weights_of(engine)
    with average.in_model():
        swapped = weights_of(engine)
    if folder:
        save(engine, folder, STEPS)
    return masters, [one.numpy() for one in flat_averages(engine)], weights, swapped, weights_of(engine)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """What two ranks hold that share each layer's experts, and the checkpoint that they have saved."""
    folder = tmp_path_factory.mktemp("averaged")
    return run_ranks(2, averaged_run, folder, 2, {}), folder / f"step_{STEPS}"


def test_each_rank_averages_its_masters_and_the_model_takes_the_average_and_gives_it_back(on_two):
    offloaded = {"zero_optimization": shipped("zero2_offload")["zero_optimization"], "bf16": {"enabled": True}}
    for masters, averages, weights, swapped, after in (*on_two[0], *run_ranks(1, averaged_run, None, 1, offloaded)):
        for group, average in enumerate(averages):
            expected = expected_average({step: groups[group] for step, groups in masters.items()})
            np.testing.assert_allclose(average, expected, rtol=3e-7, atol=1e-7)
            assert average.dtype == np.float32
        assert any(np.abs(averages[0] - masters[STEPS][0]) > 1e-4)
        assert all(np.array_equal(after[name], value) for name, value in weights.items())
        assert sum(not np.array_equal(swapped[name], after[name]) for name in after) > len(after) / 2


def test_a_checkpoint_holds_the_average_of_every_weight(on_two):
    expected = {name: value for rank in on_two[0] for name, value in rank[3].items()}
    source = open_source(on_two[1])
    assert source.state_names == ("exp_avg", "exp_avg_sq", "ema")
    for name, shape in source.shapes.items():
        found = source.read(name, "ema", 0, math.prod(shape)).view(shape)
        assert np.array_equal(found, expected[name]), name


def restore_and_save(checkpoint, out, ep_size, stage):
    engine = make(ep_size, stage, seed=99)
    average = WeightAverage(engine, DECAY)
    assert restore_first_verified(engine, [checkpoint]) == checkpoint
    save(engine, out, STEPS)
    return average.has_begun


def test_it_is_restored_bit_for_bit_on_other_ranks_and_by_way_of_a_universal_checkpoint(on_two, tmp_path):
    assert run_ranks(1, restore_and_save, on_two[1], tmp_path / "one", 1, 1) == [True]
    same_state(on_two[1], tmp_path / "one" / f"step_{STEPS}")
    write_universal(open_source(on_two[1]), {}, tmp_path / "universal")
    run_ranks(2, restore_and_save, tmp_path / "universal", tmp_path / "two", 1, 2)
    same_state(on_two[1], tmp_path / "two" / f"step_{STEPS}")


def restore_without(checkpoint, damaged):
    engine = make(1, seed=99)
    assert restore_first_verified(engine, [checkpoint]) == checkpoint
    states = list(engine.optimizer.optimizer.state.values())
    return {kind for state in states for kind in state}, refusals(restore_first_verified, engine, [damaged])


def test_a_run_without_average_restores_none_but_finds_its_damage(on_two, tmp_path):
    damaged = shutil.copytree(on_two[1], tmp_path / "damaged")
    file = damaged / "rank_00001.safetensors"
    piece = next(one for one in read_index(damaged).files[file.name].slices if one.count > 100)
    flip_bit(file, piece.tensors["ema"].offset + 1, 4)
    ((kinds, problems),) = run_ranks(1, restore_without, on_two[1], damaged)
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}
    has(only(problems), str(file), "SHA-256")


# --- whole runs -----------------------------------------------------------------------------------------------------


def evaluations(log, *names):
    return {record["step"]: [record[name] for name in names] for record in log["valid"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Options of a run in bf16, and two of four steps: with an average, and without."""
    folder = tmp_path_factory.mktemp("runs")
    ds = shipped("zero2")
    ds["scheduler"]["params"].update(warmup_num_steps=4, total_num_steps=40, warmup_max_lr=1e-2)
    inputs = write_inputs(folder, ds)
    write_record(folder / "corpus" / "valid", 600, 1800)
    run = {**inputs, "ep_size": 2, "eval_interval": 1, "save_interval": 2, "steps": 4}
    with_average = {**run, "run_dir": str(folder / "averaged"), "ema_decay": DECAY}
    logs = [run_ranks(2, train_here, one)[0] for one in (with_average, {**run, "run_dir": str(folder / "plain")})]
    return folder, run, logs


def test_evaluations_of_the_average_leave_the_training_bit_for_bit_as_it_is(runs):
    _, _, (averaged, plain) = runs
    assert losses(averaged) == losses(plain)
    names = ("loss", "bits_per_byte", "tokens")
    assert evaluations(averaged, *names) == evaluations(plain, *names)
    assert not any("ema_loss" in record for record in plain["valid"])
    first, *later = averaged["valid"]
    assert (first["ema_loss"], first["ema_bits_per_byte"]) == (first["loss"], first["bits_per_byte"])
    assert all(record["ema_loss"] != record["loss"] for record in later)
    for record in later:
        ratio = record["ema_bits_per_byte"] / record["bits_per_byte"]
        assert ratio == pytest.approx(record["ema_loss"] / record["loss"])


def test_a_resumed_run_goes_on_with_the_average_to_the_bit_and_says_when_it_begins_changes_or_ends(runs):
    folder, run, (whole, _) = runs
    cut = {**run, "run_dir": str(folder / "cut")}
    run_ranks(2, train_here, {**cut, "steps": 2, "ema_decay": DECAY})
    (log, _), said = run_and_hear(2, train_here, {**cut, "resume": True, "ema_decay": DECAY})
    assert evaluations(log, "loss", "ema_loss") == evaluations(whole, "loss", "ema_loss")
    assert not [line for line in said.splitlines() if "average" in line and "valid_loss" not in line]
    same_state(folder / "cut" / "checkpoints" / "step_4", folder / "averaged" / "checkpoints" / "step_4")

    _, said = run_and_hear(2, train_here, {**cut, "resume": True, "steps": 5, "ema_decay": 0.5})
    assert f"the decay of the averaged weights changes after step 4: {DECAY} -> 0.5" in said
    _, said = run_and_hear(2, train_here, {**cut, "resume": True, "steps": 6})
    assert "the average of the weights ends after step 5 (--ema_decay 0.5)" in said
    assert "ema" not in open_source(folder / "cut" / "checkpoints" / "step_6").state_names
    (log, _), said = run_and_hear(2, train_here, {**cut, "resume": True, "steps": 7, "ema_decay": DECAY})
    assert "the checkpoint of step 6 holds no averaged weights; the average begins" in said
    last = log["valid"][-1]
    assert last["ema_loss"] == last["loss"]
    records = (folder / "cut" / "resumes.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"]["ema_decay"] for line in records if line] == [DECAY, 0.5, None, DECAY]


# --- use ------------------------------------------------------------------------------------------------------------


def test_tools_and_library_take_the_average_and_say_where_there_is_none(runs, tmp_path, call):
    folder, _, _ = runs
    source = open_source(folder / "averaged" / "checkpoints" / "step_4")

    convert = partial(call, "convert", "--ema")

    convert(folder / "averaged", tmp_path / "averaged.pt")
    convert(folder / "averaged", tmp_path / "hf")
    state = torch.load(tmp_path / "averaged.pt")
    for name, shape in source.shapes.items():
        assert torch.equal(state[name], source.read(name, "ema", 0, math.prod(shape)).view(shape)), name
    for path, options in ((tmp_path / "hf", {}), (folder / "averaged", {"ema": True})):
        model = plain_state(megamoe.load_model(path, **options))
        assert all(torch.equal(state[name], model[name]) for name in source.shapes)
    for words in ((folder / "plain", tmp_path / "no.pt"), (tmp_path / "hf", "no")):
        has(only(refusals(convert, *words)), str(words[0]), "no averaged weights", "--ema_decay")
    assert not (tmp_path / "no.pt").exists()
