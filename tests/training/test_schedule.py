import pytest
import torch
from ranks import run_ranks
from torch import nn

from megamoe.ds_config import ScheduleConfig
from megamoe.training.engine import build_engine
from megamoe.training.schedule import learning_rate
from megamoe.training.step import TrainStep

# Step and learning rate as the original training run printed them.
LOGGED = {
    10: "1.5e-05", 20: "3e-05", 30: "4.5e-05", 40: "6e-05", 50: "7.5e-05", 60: "9e-05", 70: "0.000105", 80: "0.00012",
    90: "0.000135", 100: "0.00015", 250: "0.000375", 1000: "0.0015", 1500: "0.00141667", 2000: "0.00133333",
    2500: "0.00125", 3000: "0.00116667", 4000: "0.001", 5000: "0.000833333", 6000: "0.000666667", 7000: "0.0005",
    8000: "0.000333333", 9000: "0.000166667", 10000: "0",
}  # fmt: skip
SCHEDULE = {"peak": 1.5e-3, "warmup_steps": 1000, "total_steps": 10_000}


@pytest.mark.parametrize("step", LOGGED)
def test_the_schedule_prints_as_logged(step):
    assert f"{learning_rate(step, **SCHEDULE):.6g}" == LOGGED[step]


def test_it_starts_at_0_peaks_at_the_end_of_the_warm_up_and_is_0_from_the_total_on():
    assert learning_rate(0, **SCHEDULE) == 0
    assert learning_rate(1000, **SCHEDULE) == 1.5e-3
    assert learning_rate(999, **SCHEDULE) < 1.5e-3 > learning_rate(1001, **SCHEDULE) > 0
    assert learning_rate(9999, **SCHEDULE) > 0
    assert [learning_rate(step, **SCHEDULE) for step in (10_000, 10_001, 50_000)] == [0, 0, 0]


def test_an_initial_rate_is_where_the_warm_up_starts():
    rates = [learning_rate(step, peak=10, warmup_steps=4, total_steps=8, initial=2) for step in range(9)]
    assert rates == [2, 4, 6, 8, 10, 7.5, 5, 2.5, 0]


def test_without_a_warm_up_it_starts_at_the_peak():
    assert [learning_rate(step, peak=8, warmup_steps=0, total_steps=4) for step in range(5)] == [8, 6, 4, 2, 0]


class OneWeight(nn.Module):
    """A loss with gradient 1, for which AdamW without decay moves the weight by the learning rate."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.loss_parts = ("cross_entropy",)
        self.register_buffer("step_losses", torch.zeros(1))

    def forward(self, x):
        return (self.weight * x).sum()


def engine_rates():
    """The rates an engine holds after the logged steps, and how far its weight moves in the first 250.

    The first 250 steps and the last three before each logged one are real; between them only its scheduler is moved on.
    """
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.0}},
    }
    schedule = ScheduleConfig(warmup_type="linear", warmup_max_lr=1.5e-3, warmup_num_steps=1000, total_num_steps=10_000)
    engine = build_engine(OneWeight(), ds, schedule)
    train_step = TrainStep(engine, None)
    printed, moved = {}, []
    for step in range(1, max(LOGGED) + 1):
        if step <= 250 or any(logged - 3 < step <= logged for logged in LOGGED):
            before = engine.module.weight.item()
            engine.backward(engine(torch.ones(1)))
            train_step.update()
            moved.append(before - engine.module.weight.item())
        else:
            engine.lr_scheduler.step()  # what a real step does last
        if step in LOGGED:
            printed[step] = f"{engine.get_lr()[0]:.6g}"
    return printed, moved


def test_an_engine_holds_the_logged_rate_after_each_logged_step():
    ((printed, moved),) = run_ranks(1, engine_rates)
    assert printed == LOGGED
    # The first step is taken with the rate of step 0.
    used = [learning_rate(step, **SCHEDULE) for step in range(250)]
    assert moved[:250] == pytest.approx(used, rel=1e-3, abs=1e-8)
