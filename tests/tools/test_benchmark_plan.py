"""The check of the planner's arithmetic: what it fits, and that it measures real steps."""

from dataclasses import replace

import benchmark_plan as tool
import pytest
from ranks import run_alone
from toy import PRESET, shipped

from megamoe.config.model import ModelConfig
from megamoe.planning import rates
from megamoe.utils.errors import UserError
from megamoe.utils.hardware import Device

DS = shipped("zero2")
CPU = Device("CPU", 4e11, 1e11, 1e10, 2e10, 1e9, 1e9, 1e9, 1e9)
RATES = replace(
    tool.IDEAL, products=0.7, attention=0.7 * rates.CPU.attention / rates.CPU.products, memory=1.5, operator=3e-5
)


def test_the_constants_that_made_the_steps_are_found_and_steps_that_none_can_make_are_refused():
    fitted = [case.setup(DS) for case in tool.cases()[0].values()]
    measured = [tool.phases(setup, CPU, RATES) for setup in fitted]
    found = tool.fit(fitted, measured, CPU)
    for name in tool.CONSTANTS:
        assert getattr(found, name) == pytest.approx(getattr(RATES, name))
    measured[1] = [seconds / 1000 for seconds in measured[1]]  # the larger model is the faster
    with pytest.raises(UserError, match="not positive"):
        tool.fit(fitted, measured, CPU)


def test_ratios_are_taken_round_by_round():
    steps = {"one": [1.0, 10.0, 3.0], "other": [2.0, 30.0, 6.0]}  # the host was ten times slower in the second
    assert tool.ratios(steps, "one") == {"one": 1.0, "other": 2.0}


def rounds_of_toys():
    case = tool.Case(ModelConfig(**{**PRESET, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64}), 2, 16)
    with tool.one_rank_of(1):
        return tool.measure({"toy": case, "longer": replace(case, micro_batch=4)}, DS, 2)


def test_each_round_measures_the_phases_of_every_model():
    measured = run_alone(rounds_of_toys)
    assert list(measured) == ["toy", "longer"]
    for steps in measured.values():
        assert len(steps) == 2
        assert all(len(step) == len(tool.PHASES) and min(step) > 0 for step in steps)
