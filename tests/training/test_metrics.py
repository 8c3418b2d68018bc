"""What is logged of a window of steps."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.data.batches import BatchShape
from megamoe.model.decoder import Decoder
from megamoe.training.metrics import StepMetrics
from megamoe.training.step import StepResult
from megamoe.training.step_sums import NO_FLAGS
from megamoe.utils.hardware import Peak


def result(loss, **parts):
    return StepResult(loss=loss, parts=parts, grad_norm=1.0, applied=True, flags=NO_FLAGS, balance=None)


def metrics(batches=(2,) * 9, stages=(), peak=Peak(1e12, is_measured=False)):  # noqa: B008 - it is frozen
    """Of steps that take as many samples as `batches` has."""
    engine = SimpleNamespace(get_lr=lambda: [0.1], skipped_steps=0, train_batch_size=iter(batches).__next__)
    model = Decoder(ModelConfig(**PRESET))
    step = SimpleNamespace(engine=engine, device=torch.device("cpu"), model=model)
    return StepMetrics(step, BatchShape(2, accumulation=3, world_size=1, seq_len=16, stages=stages), peak)


def test_loss_and_its_parts_are_means_over_the_steps_of_a_window():
    window = metrics()
    window.add(result(9.0, balance=9.0, mtp=9.0), 1.0)
    window.restart(1)
    window.add(result(4.0, balance=1.0, mtp=6.0), 1.0)
    window.add(result(3.0, balance=2.0, mtp=5.0), 1.0)
    values = window.values(3, 10)
    assert {name: value for name, value in values.items() if "loss" in name} == {
        "loss": 3.5,
        "balance_loss": 1.5,
        "mtp_loss": 5.5,
    }


def test_speed_and_time_left_count_the_samples_that_each_step_takes():
    window = metrics([2, 2, 4, 4], stages=((2, 2), (4, 4)))
    for _ in range(3):
        window.add(result(4.0), 0.5)
    values = window.values(3, 6)
    assert values["batch_size"] == 4
    assert values["tokens_per_second"] == pytest.approx((2 + 2 + 4) * 16 / 1.5)
    assert values["seconds_left"] == pytest.approx((4 + 6 + 6) / (8 / 1.5))
    plain = metrics()
    plain.add(result(4.0), 0.5)
    values = plain.values(1, 3)
    assert "batch_size" not in values
    assert values["tokens_per_second"] == pytest.approx(2 * 16 / 0.5)


def test_mfu_is_a_share_of_the_peak_and_a_faster_step_raises_a_measured_one():
    exact = metrics()
    exact.add(result(4.0), 0.5)
    flops = 1e12 * exact.values(1, 1)["mfu"]  # of a step that takes half a second
    for is_measured, shares in ((True, [0.5, 1.0, 0.5]), (False, [0.5, 2.0, 1.0])):
        window = metrics(peak=Peak(2 * flops, is_measured))
        for step, (seconds, share) in enumerate(zip((0.5, 0.125, 0.25), shares, strict=True), start=1):
            window.add(result(4.0), seconds)
            assert window.values(step, 9)["mfu"] == pytest.approx(share)
            window.restart(step)


def test_a_skipped_step_has_no_balance_and_no_entropy_of_any_block():
    window = metrics()
    window.add(result(4.0), 0.5)
    values = window.values(1, 3)
    assert math.isnan(values["running_max_vio"])
    assert math.isnan(values["router_entropy"])
    assert values["router_entropy_by_block"] == {}  # not a number that JSON does not have
