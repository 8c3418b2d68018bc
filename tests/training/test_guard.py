"""Which steps are spikes, and when a run must go back: by losses and norms alone."""

import json
import math

import numpy as np
import pytest

from megamoe.config.run import RunConfig
from megamoe.training.guard import Guard, Return
from megamoe.training.step import StepResult
from megamoe.training.step_sums import NO_FLAGS

DRAW = np.random.default_rng(0)
LOSSES, NORMS = DRAW.normal(4, 0.1, 200).tolist(), DRAW.lognormal(-0.5, 0.2, 200).tolist()


def new_guard(mode, warmup=0):
    return Guard(RunConfig(ds_config="ds.json", guard=mode, guard_window=20, guard_skips=3), warmup)


def give(guard, step, loss, norm, lowers_scale=False):
    """What the loop and a step make of it."""
    is_finite = math.isfinite(norm)
    is_spike = is_finite and guard.skips(loss, norm)
    result = StepResult(loss, {}, norm, is_finite and not is_spike, NO_FLAGS, None, is_spike)
    return guard.after(step, result, lowers_scale)


def guard_after(steps, mode="act", warmup=0):
    guard = new_guard(mode, warmup)
    for step in range(1, steps + 1):
        assert give(guard, step, LOSSES[step], NORMS[step]) is None
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(5.0, 0.6), (4.0, 3.0), (math.nan, 0.6)])
def test_a_loss_or_a_norm_far_above_the_window_is_a_spike_that_only_act_skips(loss, norm):
    for mode in ("off", "warn", "act"):
        guard = guard_after(100, mode)
        before = json.dumps(guard.state())
        assert guard.skips(loss, norm) == (mode == "act")
        assert not guard.skips(4.0, 0.6)
        assert not guard.skips(3.0, 0.01)  # far below
        assert json.dumps(guard.state()) == before  # it was only asked
        event = give(guard, 101, loss, norm)
        assert (event and event.kind) == {"off": None, "warn": "warning", "act": "skip"}[mode]
        if event:
            window = LOSSES[81:101]
            assert event.values["loss_mean"] == pytest.approx(np.mean(window))
            assert event.values["loss_deviation"] == pytest.approx(np.std(window, ddof=1))
            assert event.line.startswith("guard: step 101 is ")
            assert guard.state()["losses"] == window  # the spike is not in it
        assert guard.guarded_steps == (mode == "act")


def test_the_steps_of_the_warm_up_enter_no_window():
    guard = guard_after(30, warmup=25)
    assert guard.state()["losses"] == LOSSES[26:31]
    assert not guard.skips(100.0, 100.0)
    for step in range(31, 36):
        assert give(guard, step, LOSSES[step], NORMS[step]) is None
    assert guard.skips(100.0, 100.0)


SPIKE, GOOD, NOT_FINITE = (8.0, 0.6), (4.0, 0.6), (4.0, math.inf)
# Mode, steps, the reasons that are given, and why the run must go back after the last.
CASES = {
    "a spike is said once, and a level that stays is taken": (
        "warn", [SPIKE] * 39 + [GOOD], ["spike"] + [None] * 39, None,
    ),
    "a gradient that is not finite does not hide the spikes after it nor a new level": (
        "warn", [NOT_FINITE, SPIKE, SPIKE, NOT_FINITE, SPIKE], ["not finite", "spike", None, "not finite", None], None,
    ),
    "several skipped steps in a row of either kind": (
        "act", [SPIKE, NOT_FINITE, (4.0, 9.0)], ["spike", "not finite", "spike"],
        Return("the last 3 steps were skipped", 50),
    ),
    "steps that only lower the loss scale": (
        "act", [(*NOT_FINITE, True)] * 9, ["not finite, loss scale lowered"] * 9, None,
    ),
    "a good step begins a new row": ("act", [SPIKE, SPIKE, GOOD] * 16, ["spike", "spike", None] * 16, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_steps_give_their_reasons_and_send_the_run_back_to_before_those_that_were_skipped(case):
    mode, steps, expected, why = CASES[case]
    guard, reasons = guard_after(50, mode), []
    for step, given in enumerate(steps, start=51):
        assert guard.must_go_back() is None
        event = give(guard, step, *given)
        reasons.append(event.values["reason"] if event and event.values["reason"] != "climb" else None)
        assert mode == "warn" or event is None or event.kind == "skip"
    assert reasons == expected
    assert guard.must_go_back() == why
    if "new level" in case:
        assert guard.state()["losses"] == guard.state()["norms"] == []  # three of it


def climbing(guard, first, steps):
    """A loss that climbs by 0.03 a step, which is no spike; returns the reasons and what is said."""
    found = []
    for step in range(first, first + steps):
        event = give(guard, step, LOSSES[step] + 0.03 * (step - first), NORMS[step])
        found.append((guard.must_go_back(), event and event.line))
    return found


def test_a_loss_that_climbs_past_its_best_by_the_margin_sends_the_run_back_to_its_best():
    guard = guard_after(100)
    assert guard.good_until > 90  # the best was before, but what is near it is noise
    found = climbing(guard, 101, 60)
    number = next(number for number, (why, _) in enumerate(found) if why)
    assert 95 < found[number][0].until <= 110
    assert 0.5 < 0.03 * number < 0.5 + 20 * 0.03 + 0.3  # it lags by its length
    assert "has climbed 0.5" in found[number][0].reason
    assert guard_after(199).must_go_back() is None


def test_under_warn_a_climb_is_said_once():
    guard = guard_after(100, "warn")
    found = climbing(guard, 101, 60)
    assert [why for why, _ in found if why] == []
    (line,) = [line for _, line in found if line]
    assert "with --guard act the run would go back" in line


@pytest.mark.parametrize("at", [3, 52, 110])
def test_a_restored_guard_takes_the_decisions_of_one_that_went_on(at):
    one = new_guard("act")
    other, decisions = None, []
    for step in range(1, 160):
        loss = 8.0 if step in (51, 52, 53) else LOSSES[step] + 0.03 * max(step - 100, 0)
        pair = []
        for guard in (one, other) if other else (one,):
            event = give(guard, step, loss, NORMS[step])
            pair.append((event and event.values, guard.must_go_back(), guard.guarded_steps, guard.good_until))
        assert pair[-1] == pair[0]
        decisions.append(pair[0][1])
        if step == at:
            other = new_guard("act")
            other.restore(json.loads(json.dumps(one.state())), step)
    assert any(decisions)


def test_without_a_state_a_guard_knows_nothing_of_the_steps_before():
    guard = guard_after(50)
    guard.restore(None, 700)
    assert not guard.skips(100.0, 100.0)
    assert new_guard("off").state() is None
    # It knows of nothing before the checkpoint that it goes on from, which is good.
    assert guard.good_until == 700
    for step in (701, 702, 703):
        give(guard, step, 4.0, math.inf)
    assert guard.good_until == 700
    assert guard.must_go_back().until == 700
    assert guard_after(7).good_until == 7
    assert guard_after(7, "warn").good_until is None


def test_where_steps_are_skipped_what_a_step_has_done_counts():
    guard = guard_after(50)
    assert guard.skips(8.0, 0.6)
    assert guard.after(51, StepResult(8.0, {}, 0.6, True, NO_FLAGS, None), False) is None
    assert guard.must_go_back() is None
