"""Check the planner's arithmetic on this host's CPU: constants fitted on two presets predict the steps of three others.

    python tools/dev/benchmark_plan.py --json plan.json          nine rounds, two minutes on one core

One process trains all five models on one thread, a step of each in turn and in alternating order, and takes the time of
the process, so other load on the host hardly matters. Three constants (the rates of GEMMs and of memory, and the
time of an operator) are fitted to the phases of the steps of `tiny` and `small`. What they predict of the others is
printed as a ratio to the step of `small`, next to the median of the ratios measured in each round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported

import torch
from simulate import one_rank_of

from megamoe.config import cli
from megamoe.config.model import ModelConfig, load_preset
from megamoe.config.precision import precision_of
from megamoe.config.recipe import Recipe, read_recipe
from megamoe.data.batches import Batch
from megamoe.launch.cpu import keep_freed_memory
from megamoe.planning.planner import this_machine
from megamoe.planning.rates import CPU, Rates
from megamoe.planning.sharding import Setup, read_setup
from megamoe.planning.step_time import step_time
from megamoe.training.step import TrainStep, build_train_step
from megamoe.utils.data_sheets import Device
from megamoe.utils.errors import Problems, UserError

ROOT = Path(__file__).parents[2]
WARM_UP = 2  # steps in which kernels are chosen, memory and moments are made
# The phases that are measured, as the planner's that each holds.
PHASES = (("forward", "head and loss"), ("backward",), ("update",))
# Rates at which nothing takes time, and what each fitted constant is at 1. Attention follows the GEMMs: two models
# tell too little of it apart.
IDEAL = Rates(
    gemms=math.inf, attention=math.inf, memory=math.inf, links=1.0, operator=0.0, region=0.0, parameter=0.0, wait=0.0
)
CONSTANTS = {
    "gemms": replace(IDEAL, gemms=1.0, attention=CPU.attention / CPU.gemms),
    "memory": replace(IDEAL, memory=1.0),
    "operator": replace(IDEAL, operator=1.0),
}


@dataclass(frozen=True)
class Case:
    """A model and the batch of its step."""

    config: ModelConfig
    micro_batch: int
    seq_len: int

    def setup(self, base: Recipe) -> Setup:
        return read_setup(self.config, self.recipe(base), 1, self.seq_len, on_cpu=True)

    def recipe(self, base: Recipe) -> Recipe:
        return base.replaced({"train_micro_batch_size_per_gpu": self.micro_batch, "gradient_accumulation_steps": 1})


def cases() -> tuple[dict[str, Case], dict[str, Case]]:
    """Those that the constants are fitted to, and those that they predict, by name."""
    tiny, small = load_preset("tiny"), load_preset("small")
    few = small.model_copy(update={"num_hidden_layers": 2, "vocab_size": 8192})
    wide = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
    many = {"hidden_size": 384, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2,
            "num_local_experts": 64, "num_experts_per_tok": 4}  # fmt: skip
    gated = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_local_experts": 16, "gated_mlp": True}  # fmt: skip
    fitted = {"tiny, 4 x 128 tokens": Case(tiny, 4, 128), "small, 1 x 1,024 tokens": Case(small, 1, 1024)}
    predicted = {
        "8 experts 768 x 2048, 1 x 512 tokens": Case(few.model_copy(update=wide), 1, 512),
        "64 experts 384 x 192, top-4, 2 x 256 tokens": Case(few.model_copy(update=many), 2, 256),
        "16 gated experts 256 x 768, 8 x 128 tokens": Case(few.model_copy(update=gated), 8, 128),
    }
    return fitted, predicted


# --- measured -------------------------------------------------------------------------------------------------------


def measure(chosen: dict[str, Case], base: Recipe, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of the process in each phase of a step, for each round."""
    torch.set_num_threads(1)
    keep_freed_memory()
    built = {name: (build_train_step(case.config, case.recipe(base)), ids_of(case)) for name, case in chosen.items()}
    for train_step, ids in built.values():
        for _ in range(WARM_UP):
            take_step(train_step, ids)
    seconds: dict[str, list[list[float]]] = {name: [] for name in built}
    for number in range(rounds):
        for name in list(built) if number % 2 == 0 else reversed(list(built)):
            seconds[name].append(take_step(*built[name]))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return seconds


def ids_of(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(case.config.vocab_size, (case.micro_batch, case.seq_len), generator=generator)


def take_step(train_step: TrainStep, ids: torch.Tensor) -> list[float]:
    """Seconds of each of `PHASES`."""
    times = [time.process_time()]
    train_step.forward_backward([Batch(ids, ids)], lambda phase: times.append(time.process_time()))
    train_step.update()
    times.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(times)]


# --- predicted ------------------------------------------------------------------------------------------------------


def phases(setup: Setup, device: Device, rates: Rates) -> list[float]:
    """Predicted seconds of each of `PHASES`."""
    seconds = {phase.name: phase.seconds for phase in step_time(setup, device, 1, rates).phases}
    return [sum(seconds[name] for name in names) for names in PHASES]


def fit(setups: list[Setup], measured: list[list[float]], device: Device) -> Rates:
    """The constants that come nearest to the phases measured, by least squares of the relative errors. Raises UserError
    where one is not positive.

    Args:
        measured: seconds of each phase, for each of `setups`.
    """
    rows, target = [], [value for values in measured for value in values]
    for setup in setups:
        rows += list(zip(*(phases(setup, device, rates) for rates in CONSTANTS.values()), strict=True))
    matrix = torch.tensor(rows, dtype=torch.float64) / torch.tensor(target, dtype=torch.float64).unsqueeze(1)
    factors = torch.linalg.lstsq(matrix, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()
    if min(factors) <= 0:
        found = ", ".join(f"{name} {factor:.3g}" for name, factor in zip(CONSTANTS, factors, strict=True))
        raise UserError(f"the measured steps give a constant that is not positive ({found}); give more --rounds.")
    gemms, memory, operator = factors
    attention = CONSTANTS["gemms"].attention / gemms
    return replace(IDEAL, gemms=1 / gemms, attention=attention, memory=1 / memory, operator=operator)


def ratios(steps: dict[str, list[float]], over: str) -> dict[str, float]:
    """Median of each step's ratio to the step of `over`, round by round."""
    return {
        name: statistics.median(a / b for a, b in zip(own, steps[over], strict=True)) for name, own in steps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Check the planner's arithmetic on this host's CPU.",
    )
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs/zero2.json"), help="DeepSpeed JSON")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each model")
    parser.add_argument("--json", type=Path, help="file to write all measurements and predictions to")
    args = check(parser.parse_args())
    recipe = read_recipe(args.ds_config, 1, on_cpu=True, auto=precision_of(torch.device("cpu")).choice)
    fitted, predicted = cases()
    every = {**fitted, **predicted}
    with contextlib.redirect_stdout(sys.stderr), one_rank_of(1):  # DeepSpeed prints as it starts
        measured = measure(every, recipe, args.rounds)
        device = this_machine(1)
    medians = {name: [statistics.median(phase) for phase in zip(*own, strict=True)] for name, own in measured.items()}
    setups = {name: case.setup(recipe) for name, case in every.items()}
    rates = fit([setups[name] for name in fitted], [medians[name] for name in fitted], device)
    expected = {name: phases(setup, device, rates) for name, setup in setups.items()}
    base = list(fitted)[-1]
    seen = ratios({name: [sum(step) for step in own] for name, own in measured.items()}, base)
    foreseen = ratios({name: [sum(values)] for name, values in expected.items()}, base)

    print(
        f"fitted: GEMMs {rates.gemms * device.half_flops / 1e9:.0f} GFLOP/s, "
        f"memory {rates.memory * device.memory_rate / 1e9:.1f} GB/s, {rates.gemms:.2f} and {rates.memory:.2f} of "
        f"the rates measured alone; operator {1e6 * rates.operator:.1f} us\n\n"
        f"| step over that of {base} | measured | predicted | off |\n|---|---|---|---|"
    )
    for name in predicted:
        print(f"| {name} | {seen[name]:.3f} | {foreseen[name]:.3f} | {foreseen[name] / seen[name] - 1:+.1%} |")
    if args.json:
        record = {"device": asdict(device), "rates": asdict(rates), "measured_seconds": measured,
                  "predicted_seconds": expected, "measured_ratios": seen, "predicted_ratios": foreseen}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    if args.rounds < 1:
        problems.append(f"--rounds is {args.rounds}; give at least 1.")
    if args.json and not args.json.parent.is_dir():
        problems.append(f"--json is {args.json}, whose folder does not exist; make it first.")
    problems.refuse()
    return args


if __name__ == "__main__":
    cli.run(main)
