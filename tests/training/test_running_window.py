"""Means of the steps before, compared with numpy's; what a guard makes of them: tests/training/test_guard.py."""

import numpy as np
import pytest

from megamoe.training.running_window import RunningWindow, SmoothedLoss

VALUES = np.random.default_rng(0).normal(4, 0.3, 40).tolist()


@pytest.mark.parametrize("level", [4.0, 0.0])
def test_a_flat_window_has_a_deviation(level):
    window = RunningWindow(8, floor=0.01)
    for _ in range(8):
        window.values.append(level)
    assert window.std == pytest.approx(max(0.01 * level, np.finfo(float).eps))
    assert window.z_score(level) == 0


def test_the_smoothed_loss_is_numpys_weighted_mean_and_knows_its_least():
    smoothed, means = SmoothedLoss(10, 0.05), []
    for step in range(1, len(VALUES) + 1):
        smoothed.add(step, VALUES[step - 1])
        weights = 0.9 ** np.arange(step)[::-1]
        if step < 10:
            assert smoothed.mean is None
            assert smoothed.climb == 0
            continue
        means.append(np.average(VALUES[:step], weights=weights))
        assert smoothed.mean == pytest.approx(means[-1], rel=1e-12)
        assert smoothed.best_step == 10 + np.argmin(means)
        low = [10 + number for number in range(len(means)) if means[number] <= min(means[: number + 1]) + 0.05]
        assert smoothed.low_step == low[-1]
        assert smoothed.climb == pytest.approx(means[-1] - min(means), abs=1e-12)


@pytest.mark.parametrize(("before", "after"), [(10, 40), (40, 10)])
def test_a_mean_that_goes_on_over_another_number_of_steps_is_that_of_the_same_losses(before, after):
    one = SmoothedLoss(before, 0.05)
    for step in range(1, 41):
        one.add(step, 4.0)
    other = SmoothedLoss(after, 0.05, **one.state())
    for step in range(41, 60):
        other.add(step, 4.0)
        assert other.mean == pytest.approx(4.0)
        assert other.climb == pytest.approx(0)
