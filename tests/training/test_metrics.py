"""What is logged of a window of steps."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.config.phases import Phase, Phases
from megamoe.model.costs import train_flops_per_token
from megamoe.model.decoder import Decoder
from megamoe.training.balancing import Balance
from megamoe.training.metrics import StepMetrics
from megamoe.training.step import StepResult
from megamoe.training.step_sums import NO_FLAGS
from megamoe.utils.hardware import Peak


def result(loss, balance=None, sources=(), **parts):
    return StepResult(
        loss=loss, parts=parts, grad_norm=1.0, applied=True, flags=NO_FLAGS, balance=balance, sources=sources
    )


def phase(samples, first_step=1, seq_len=16):
    return Phase(first_step, seq_len, 2, samples // 2, samples, ())


def metrics(*phases, peak=Peak(1e12, is_measured=False), names=()):  # noqa: B008 - it is frozen
    """Of a run with these phases; by default of two samples per step."""
    engine = SimpleNamespace(get_lr=lambda: [0.1], skipped_steps=0)
    model = Decoder(ModelConfig(**PRESET))
    step = SimpleNamespace(engine=engine, device=torch.device("cpu"), model=model)
    return StepMetrics(step, Phases(phases or (phase(2),), 1), peak, names)


def test_loss_and_its_parts_are_means_over_the_steps_of_a_window():
    window = metrics()
    window.add(result(9.0, z=9.0, mtp=9.0), 1, 1.0)
    window.restart(1)
    window.add(result(4.0, z=1.0, mtp=6.0), 2, 1.0)
    window.add(result(3.0, z=2.0, mtp=5.0), 3, 1.0)
    values = window.values(3, 10)
    assert {name: value for name, value in values.items() if "loss" in name} == {
        "loss": 3.5,
        "z_loss": 1.5,
        "mtp_loss": 5.5,
    }


def test_speed_and_time_left_count_the_tokens_that_each_step_takes():
    phases = phase(2), phase(4, first_step=3), phase(6, first_step=5, seq_len=32)
    window = metrics(*phases)
    for data_step in (1, 2, 3):
        window.add(result(4.0), data_step, 0.5)
    values = window.values(3, 6)
    assert (values["batch_size"], values["seq_len"]) == (4, 16)
    assert values["tokens_per_second"] == pytest.approx((2 + 2 + 4) * 16 / 1.5)
    assert values["seconds_left"] == pytest.approx((4 + 12 + 12) / (8 / 1.5))
    plain = metrics()
    plain.add(result(4.0), 1, 0.5)
    values = plain.values(1, 3)
    assert "batch_size" not in values
    assert values["tokens_per_second"] == pytest.approx(2 * 16 / 0.5)


def test_mfu_is_a_share_of_the_peak_and_a_faster_step_raises_a_measured_one():
    exact = metrics()
    exact.add(result(4.0), 1, 0.5)
    flops = 1e12 * exact.values(1, 1)["mfu"]  # of a step that takes half a second
    for is_measured, shares in ((True, [0.5, 1.0, 0.5]), (False, [0.5, 2.0, 1.0])):
        window = metrics(peak=Peak(2 * flops, is_measured))
        for step, (seconds, share) in enumerate(zip((0.5, 0.125, 0.25), shares, strict=True), start=1):
            window.add(result(4.0), 1, seconds)
            assert window.values(step, 9)["mfu"] == pytest.approx(share)
            window.restart(step)


def test_a_skipped_step_has_no_balance_and_no_entropy_of_any_block():
    window = metrics()
    window.add(result(4.0), 1, 0.5)
    values = window.values(1, 3)
    assert math.isnan(values["running_max_vio"])
    assert math.isnan(values["router_entropy"])
    assert values["router_entropy_by_block"] == {}  # not a number that JSON does not have


def test_tokens_and_flops_so_far_are_those_of_all_data_that_was_read_however_often_the_run_was_resumed():
    phases = phase(2), phase(4, first_step=3), phase(6, first_step=5, seq_len=32)
    resumed = metrics(*phases)
    resumed.restart(4)
    resumed.add(result(4.0), 7, 0.5)  # step 5: the run has gone back by two
    values = resumed.values(5, 9)
    assert values["total_tokens"] == (2 * 2 + 2 * 4) * 16 + 3 * 6 * 32
    short, long = (train_flops_per_token(ModelConfig(**PRESET), seq_len) for seq_len in (16, 32))
    assert values["total_flops"] == pytest.approx((2 * 2 + 2 * 4) * 16 * short + 3 * 6 * 32 * long, rel=1e-12)


def test_the_loss_of_a_source_is_a_mean_over_its_tokens_in_the_window():
    window = metrics(names=["books", "code", "maths"])
    window.add(result(1.0, sources=[(20.0, 10.0), (0.0, 0.0), (3.0, 1.0)]), 1, 1.0)
    window.add(result(1.0, sources=[(70.0, 20.0), (0.0, 0.0), (0.0, 0.0)]), 1, 1.0)
    losses = {name: value for name, value in window.values(2, 9).items() if name.startswith("loss/")}
    assert losses == {"loss/books": 3.0, "loss/maths": 3.0}


def test_effective_experts_are_those_of_the_loads_of_all_steps_of_a_window_and_dead_ones_of_the_running_loads():
    window, running = metrics(), torch.tensor([[0.5, 0.498, 0.0024, 0.0], [0.25, 0.25, 0.25, 0.25]])
    for counts in ([[8, 0, 0, 0], [4, 0, 4, 0]], [[0, 8, 0, 0], [0, 4, 0, 4]]):
        window.add(result(4.0, balance=Balance(torch.tensor(counts), running, [1.0, 1.0])), 1, 1.0)
    values = window.values(2, 9)
    assert (values["effective_experts"], values["lowest_effective_experts"]) == pytest.approx((3.0, 2.0))
    assert values["dead_experts"] == 2  # of a mean of 0.25, below 0.0025
