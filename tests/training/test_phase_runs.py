"""Runs whose data, lengths and batches change, and engines whose steps have other numbers of micro-batches."""

import pytest
import torch
from engines import one_weight_engine
from ranks import run_ranks
from torch import nn
from toy import ds_config, ds_of_samples, losses, train_here, write_inputs, write_phases

from megamoe.checkpoint.index import read_index
from megamoe.training.step import TrainStep


def norms_of(zero, inputs):
    """The gradient norms of steps over these inputs, one micro-batch each, the weights after them, and what the engine
    counts."""
    engine = one_weight_engine(gradient_clipping=0.0, gradient_accumulation_steps=3, zero_optimization=zero)
    train_step, norms, weights = TrainStep(engine, None), [], []
    for values in inputs:
        train_step.accumulate(len(values))
        for value in values:
            engine.backward(engine(torch.tensor([value])))
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        result = train_step.update()
        assert result.applied
        norms.append(result.grad_norm)
        weights.append(engine.module.weight.item())
    return norms, weights, engine.global_steps, engine.global_samples


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}])
def test_a_step_is_the_mean_of_its_micro_batches_however_many_the_steps_before_had(zero):
    inputs = [[1.0], [2.0], [3.0], [1.0, 7.0], [2.0, 4.0, 9.0], [4.0, 4.0, 7.0], [5.0]]
    means = [sum(values) / len(values) for values in inputs]
    ((norms, weights, steps, samples),) = run_ranks(1, norms_of, zero, inputs)
    assert norms == pytest.approx(means)
    assert (steps, samples) == (7, sum(map(len, inputs)))
    weight = nn.Parameter(torch.zeros(1))
    adam = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    for mean, expected in zip(means, weights, strict=True):
        weight.grad = torch.tensor([mean])
        adam.step()
        assert weight.item() == pytest.approx(expected, rel=1e-5)


STAGES = (2, 3), (4, 4), (8, None)


def phases_of(folder):
    """The last phase has shorter samples of a mix."""
    mix = [f"{folder / 'corpus'}=2", str(folder / "corpus" / "valid")]
    return write_phases(folder, *STAGES, seq_len=8, data=mix)


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    run = {**write_inputs(folder, ds_of_samples(8, 2)), "run_dir": str(folder / "run"), "steps": 11}
    run["data_schedule"] = phases_of(folder)
    return run_ranks(1, train_here, run)[0]


def test_a_run_logs_the_batch_and_the_length_of_its_phases_and_takes_small_batches_first(tmp_path, on_one_rank):
    rows = on_one_rank["train"]
    assert [(row["batch_size"], row["seq_len"]) for row in rows] == [(2, 16)] * 3 + [(4, 16)] * 4 + [(8, 8)] * 4
    small = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "steps": 3}
    assert losses(run_ranks(1, train_here, small)[0]) == losses(on_one_rank)[:3]


def test_the_losses_of_phases_are_the_same_on_other_ranks_and_bit_for_bit_after_a_resume_within_one_and_at_a_border(
    tmp_path, on_one_rank
):
    run = {**write_inputs(tmp_path, ds_of_samples(8, 1)), "steps": 11, "ep_size": 2}
    run["data_schedule"] = phases_of(tmp_path)
    whole = run_ranks(2, train_here, {**run, "run_dir": str(tmp_path / "whole")})[0]
    torch.testing.assert_close(losses(whole), losses(on_one_rank), atol=1e-5, rtol=0)
    cut = {**run, "run_dir": str(tmp_path / "cut")}
    run_ranks(2, train_here, {**cut, "steps": 2})
    run_ranks(2, train_here, {**cut, "steps": 7, "resume": True})
    resumed = run_ranks(2, train_here, {**cut, "resume": True})[0]
    assert losses(resumed) == losses(whole)
    index = read_index(tmp_path / "cut" / "checkpoints" / "step_11")
    assert index.training.global_samples == 3 * 2 + 4 * 4 + 4 * 8
