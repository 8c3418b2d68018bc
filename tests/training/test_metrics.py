"""What is logged of a window of steps."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.config.phases import Phase, Phases
from megamoe.model.decoder import Decoder
from megamoe.training.metrics import StepMetrics
from megamoe.training.step import StepResult
from megamoe.training.step_sums import NO_FLAGS
from megamoe.utils.hardware import Peak


def result(loss, **parts):
    return StepResult(loss=loss, parts=parts, grad_norm=1.0, applied=True, flags=NO_FLAGS, balance=None)


def phase(samples, first_step=1, seq_len=16):
    return Phase(first_step, seq_len, 2, samples // 2, samples, ())


def metrics(*phases, peak=Peak(1e12, is_measured=False)):  # noqa: B008 - it is frozen
    """Of a run with these phases; by default of two samples per step."""
    engine = SimpleNamespace(get_lr=lambda: [0.1], skipped_steps=0)
    model = Decoder(ModelConfig(**PRESET))
    step = SimpleNamespace(engine=engine, device=torch.device("cpu"), model=model)
    return StepMetrics(step, Phases(phases or (phase(2),), 1), peak)


def test_loss_and_its_parts_are_means_over_the_steps_of_a_window():
    window = metrics()
    window.add(result(9.0, balance=9.0, mtp=9.0), phase(2), 1.0)
    window.restart(1)
    window.add(result(4.0, balance=1.0, mtp=6.0), phase(2), 1.0)
    window.add(result(3.0, balance=2.0, mtp=5.0), phase(2), 1.0)
    values = window.values(3, 10)
    assert {name: value for name, value in values.items() if "loss" in name} == {
        "loss": 3.5,
        "balance_loss": 1.5,
        "mtp_loss": 5.5,
    }


def test_speed_and_time_left_count_the_tokens_that_each_step_takes():
    phases = phase(2), phase(4, first_step=3), phase(6, first_step=5, seq_len=32)
    window = metrics(*phases)
    for of_step in (phases[0], phases[0], phases[1]):
        window.add(result(4.0), of_step, 0.5)
    values = window.values(3, 6)
    assert (values["batch_size"], values["seq_len"]) == (4, 16)
    assert values["tokens_per_second"] == pytest.approx((2 + 2 + 4) * 16 / 1.5)
    assert values["seconds_left"] == pytest.approx((4 + 12 + 12) / (8 / 1.5))
    plain = metrics()
    plain.add(result(4.0), phase(2), 0.5)
    values = plain.values(1, 3)
    assert "batch_size" not in values
    assert values["tokens_per_second"] == pytest.approx(2 * 16 / 0.5)


def test_mfu_is_a_share_of_the_peak_and_a_faster_step_raises_a_measured_one():
    exact = metrics()
    exact.add(result(4.0), phase(2), 0.5)
    flops = 1e12 * exact.values(1, 1)["mfu"]  # of a step that takes half a second
    for is_measured, shares in ((True, [0.5, 1.0, 0.5]), (False, [0.5, 2.0, 1.0])):
        window = metrics(peak=Peak(2 * flops, is_measured))
        for step, (seconds, share) in enumerate(zip((0.5, 0.125, 0.25), shares, strict=True), start=1):
            window.add(result(4.0), phase(2), seconds)
            assert window.values(step, 9)["mfu"] == pytest.approx(share)
            window.restart(step)


def test_a_skipped_step_has_no_balance_and_no_entropy_of_any_block():
    window = metrics()
    window.add(result(4.0), phase(2), 0.5)
    values = window.values(1, 3)
    assert math.isnan(values["running_max_vio"])
    assert math.isnan(values["router_entropy"])
    assert values["router_entropy_by_block"] == {}  # not a number that JSON does not have
