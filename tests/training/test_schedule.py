import math
from fractions import Fraction

import pytest
import torch
from deepspeed.runtime import lr_schedules
from engines import one_weight_engine
from ranks import run_ranks
from torch import nn

from megamoe.config.schedule import TYPES, Schedule, parse_schedule
from megamoe.training.schedule import learning_rate
from megamoe.training.step import TrainStep

# Step and learning rate as the original training run printed them.
LOGGED = {
    10: "1.5e-05", 20: "3e-05", 30: "4.5e-05", 40: "6e-05", 50: "7.5e-05", 60: "9e-05", 70: "0.000105", 80: "0.00012",
    90: "0.000135", 100: "0.00015", 250: "0.000375", 1000: "0.0015", 1500: "0.00141667", 2000: "0.00133333",
    2500: "0.00125", 3000: "0.00116667", 4000: "0.001", 5000: "0.000833333", 6000: "0.000666667", 7000: "0.0005",
    8000: "0.000333333", 9000: "0.000166667", 10000: "0",
}  # fmt: skip
SCHEDULE = {"peak": 1.5e-3, "warmup_steps": 1000, "decay": "linear", "decay_steps": 9000, "total_steps": 10_000}


def test_the_schedule_prints_as_logged():
    assert {step: f"{learning_rate(step, **SCHEDULE):.6g}" for step in LOGGED} == LOGGED


@pytest.mark.parametrize("decay", ["linear", "cosine", "1-sqrt"])
def test_a_rate_has_its_digits_at_the_last_of_a_million_steps_and_at_a_billion(decay):
    for total in (10**6, 10**9):
        for left in (1, 10, total // 3):
            share = Fraction(left, total)
            exact = {
                "linear": float(share),
                "cosine": math.sin(math.pi / 2 * float(share)) ** 2,
                "1-sqrt": -math.expm1(0.5 * math.log1p(-float(share))),
            }
            schedule = {"peak": 3e-4, "warmup_steps": 0, "decay": decay, "decay_steps": total, "total_steps": total}
            assert learning_rate(total - left, **schedule) == pytest.approx(3e-4 * exact[decay], rel=1e-6, abs=0)


# --- each type of the DeepSpeed JSON, against its own scheduler or another's ---

WARMUP, TOTAL, PEAK = 7, 40, 3e-3
STEPS = range(TOTAL + 5)


def rates_of(kind, **params):
    """Our rates after 0, 1, 2, ... optimizer steps."""
    params = {"warmup_type": "linear", "warmup_num_steps": WARMUP, **params}
    schedule = parse_schedule({"type": kind, "params": params}, PEAK, "ds.json")
    return [learning_rate(step, **vars(schedule)) for step in STEPS]


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)


def deepspeed_rates(kind, **params):
    """What DeepSpeed's scheduler holds, by its own count of steps; after N optimizer steps that is N - 1."""
    scheduler = getattr(lr_schedules, kind)(optimizer(), warmup_type="linear", warmup_num_steps=WARMUP, **params)
    rates = []
    for step in STEPS:
        scheduler.step(step)
        rates += scheduler.get_last_lr()
    return rates


def torch_rates(make):
    """What a scheduler of torch's kind holds after 0, 1, 2, ... steps."""
    one = optimizer()
    scheduler = make(one)
    rates = []
    for _ in STEPS:
        rates += scheduler.get_last_lr()
        one.step()
        scheduler.step()
    return rates


def close(rates, expected):
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_the_linear_and_the_constant_schedule_are_deepspeeds_without_its_lag():
    ends = {"warmup_min_lr": 1e-4, "warmup_max_lr": PEAK}
    linear = {**ends, "total_num_steps": TOTAL}
    close(rates_of("WarmupDecayLR", **linear), deepspeed_rates("WarmupDecayLR", **linear))
    close(rates_of("WarmupLR", **ends), deepspeed_rates("WarmupLR", **ends))


@pytest.mark.parametrize("ratios", [{}, {"warmup_min_ratio": 0.2, "cos_min_ratio": 0.1}], ids=["default", "given"])
def test_the_cosine_is_deepspeeds_whose_warm_up_lags_and_whose_cosine_does_not(ratios):
    params = {"total_num_steps": TOTAL, **ratios}
    ours, theirs = rates_of("WarmupCosineLR", **params), deepspeed_rates("WarmupCosineLR", **params)
    close(ours[:WARMUP], theirs[:WARMUP])
    close(ours[WARMUP + 1 :], theirs[WARMUP:-1])
    assert ours[WARMUP] == pytest.approx(PEAK)  # which theirs passes over
    close(ours[TOTAL:], [PEAK * ratios.get("cos_min_ratio", 0.0001)] * 5)


def test_a_linear_decay_comes_down_to_its_floor():
    ours = rates_of("WarmupDecayLR", warmup_max_lr=PEAK, total_num_steps=TOTAL, decay_min_ratio=0.25)

    def linear(one):
        return torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.25, TOTAL - WARMUP)

    close(ours[WARMUP:], torch_rates(linear)[: len(STEPS) - WARMUP])


@pytest.mark.parametrize(
    ("decay_type", "floor", "decay_steps"), [("linear", 0.1, 12), ("1-sqrt", 0.0, 12), ("1-sqrt", 0.1, TOTAL - WARMUP)]
)
def test_stable_then_decay_is_that_of_transformers(decay_type, floor, decay_steps):
    import transformers  # takes a second

    ours = rates_of(
        "WarmupStableDecayLR",
        warmup_min_lr=floor * PEAK,  # where its warm-up starts
        warmup_max_lr=PEAK,
        total_num_steps=TOTAL,
        decay_num_steps=decay_steps,
        decay_type=decay_type,
        decay_min_ratio=floor,
    )

    def wsd(one):
        return transformers.get_wsd_schedule(
            one, WARMUP, decay_steps, num_training_steps=TOTAL, min_lr_ratio=floor, decay_type=decay_type
        )

    close(ours, torch_rates(wsd))


def test_deepspeed_knows_the_types_that_have_its_names():
    assert set(TYPES) - set(lr_schedules.VALID_LR_SCHEDULES) == {"WarmupStableDecayLR"}


SHORT = {**SCHEDULE, "warmup_steps": 10, "decay_steps": 20, "total_steps": 30}


def engine_rates():
    """The rate that an engine holds after each step, and how far its weight moves in it: with AdamW without decay and a
    gradient of 1 that is the learning rate."""
    engine = one_weight_engine(Schedule(**SHORT))
    train_step, held, moved = TrainStep(engine, None), [], []
    for _ in range(32):
        before = engine.module.weight.item()
        engine.backward(engine(torch.ones(1)))
        train_step.update()
        held += engine.get_lr()
        moved.append(before - engine.module.weight.item())
    return held, moved


def test_an_engine_holds_the_rate_of_a_step_after_it_and_takes_the_first_with_that_of_step_0():
    ((held, moved),) = run_ranks(1, engine_rates)
    rates = [learning_rate(step, **SHORT) for step in range(33)]
    close(held, rates[1:])
    assert moved == pytest.approx(rates[:-1], rel=1e-3, abs=1e-8)
