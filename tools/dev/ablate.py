"""Measure what a change of the recipe is worth: `python tools/dev/ablate.py docs/results/tiny_adamw.json --steps 217`.

TABLE.json names a preset, a DeepSpeed JSON and changes of them:

    {"preset": "tiny", "ds_config": "ds_configs/tiny.json",
     "options": {"data": "data/plays-1024", "eval_samples": 1000},
     "changes": {"qk-norm": {"preset": {"qk_norm": "head"}},
                 "beta2": {"ds_config": {"optimizer.params.betas": [0.9, 0.99]}},
                 "long": {"steps": 400, "options": {"seq_len": 512}}}}

Every change is trained with every seed, and so is "baseline", without any. A run that has ended is one JSON line in
TABLE.jsonl, and is not repeated by the next call. The table of all lines is printed and drawn in TABLE.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Annotated, Any

import psutil
import torch
from ablation_results import BASELINE, draw, groups_of, measure_of, read_lines, table_of
from deepspeed.accelerator import get_accelerator
from pydantic import Field

from megamoe.config import cli
from megamoe.config.model import JsonModel, ModelConfig, validate
from megamoe.config.phases import PhaseSettings, make_phases, read_phases
from megamoe.config.precision import Precision, precision_of
from megamoe.config.recipe import Recipe, read_recipe
from megamoe.config.run import RunConfig, parse_run
from megamoe.formats.config_json import find_preset
from megamoe.model.costs import parameter_count, train_flops_per_token
from megamoe.monitoring.log_files import read_log
from megamoe.pretrain import check_run
from megamoe.utils.errors import Problems, UserError, unknown_key
from megamoe.utils.json_files import read_json, write_json

ROOT = Path(__file__).parents[2]
Count = Annotated[int, Field(gt=0)]
Section = Annotated[dict[str, Any], Field(default_factory=dict)]
KEY = ("name", "seed", "steps", "ranks", "change")  # what tells the runs of a table apart
# Options of pretrain.py that the runner gives.
OWN_OPTIONS = ("preset", "ds_config", "run_dir", "steps", "seed")


@dataclass(frozen=True)
class Trial:
    """One run of the table."""

    name: str  # of the change
    seed: int
    ranks: int
    steps: int
    change: dict[str, Any]
    model: ModelConfig
    recipe: Recipe
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """What tells it from other runs in the lines of results."""
        return _key_of(vars(self))

    @property
    def digest(self) -> str:
        """A hash of all that it trains with; a field that is newer than a result has its default."""
        model = self.model.model_dump(exclude_defaults=True)
        whole = json.dumps([model, self.recipe.json, self.options], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


# --- the table ------------------------------------------------------------------------------------------------------


class Table(JsonModel):
    """A table as its file has it."""

    preset: str = "tiny"
    ds_config: str = "ds_configs/tiny.json"
    options: Section
    changes: Annotated[dict[str, dict[str, Any]], Field(default_factory=dict)]


class Change(JsonModel):
    """One of its changes."""

    preset: Section
    ds_config: Section
    options: Section
    steps: Count | None = None
    ranks: Count | None = None


def read_table(path: Path, steps: int | None, ranks: int, seeds: list[int], only: list[str]) -> list[Trial]:
    """The runs that a table asks for. Raises one UserError with all problems of its changes, or those of the base.

    Args:
        steps: of a run whose change names no other number; by default those of the schedule. The schedule ends there.
        only: names of changes; empty for all.
    """
    table: Table = validate(Table, read_json(path), str(path))
    changes = {BASELINE: {}, **table.changes}
    problems = Problems(unknown_key(f"{path}: changes", one, changes, "change") for one in only if one not in changes)
    preset = problems.attempt(find_preset, table.preset)
    device, precision = _device()  # the same for all runs, and in their digest
    recipe = problems.attempt(read_recipe, table.ds_config, ranks, device.type == "cpu", precision.choice)
    problems.refuse()
    trials: list[Trial] = []
    base = Trial(BASELINE, seeds[0], ranks, steps or 0, {}, preset, recipe, table.options)
    for name, change in changes.items():
        trial = problems.attempt(_trial, f"{path}: {name}", name, change, base, steps)
        if name == BASELINE:
            problems.refuse()  # what is wrong with it is so with every change
        trials += [replace(trial, seed=seed) for seed in seeds if trial]
    problems.refuse()
    return [trial for trial in trials if not only or trial.name in only]


@cache
def _device() -> tuple[torch.device, Precision]:
    """What the runs train on, and what it is the faster in."""
    device = torch.device(get_accelerator().device_name())
    return device, precision_of(device)


def _trial(where: str, name: str, given: dict[str, Any], base: Trial, steps: int | None) -> Trial:
    """`base` with one change. Raises UserError."""
    change: Change = validate(Change, given, where)
    problems = Problems()
    model = problems.attempt(validate, ModelConfig, {**base.model.model_dump(), **change.preset}, where)
    options = {**base.options, **change.options}
    for option in options:
        if option in OWN_OPTIONS:
            problems.append(f"{where}: option {option} is given by the runner; leave it out.")
        elif option not in RunConfig.model_fields:
            problems.append(unknown_key(f"{where}: options", option, RunConfig.model_fields, "option"))
    problems.refuse()
    steps, ranks = change.steps or steps, change.ranks or base.ranks
    has_end = base.recipe.schedule.total_steps is not None
    changes = {"scheduler.params.total_num_steps": steps} if steps and has_end else {}
    recipe = replace(base.recipe, where=where, world_size=ranks).replaced({**changes, **change.ds_config})
    steps = steps or recipe.schedule.total_steps
    if steps is None:
        raise UserError(f"{where}: its schedule has no end; give --steps, or a change's own steps.")
    return Trial(name, base.seed, ranks, steps, given, model, recipe, options)


# --- a run ----------------------------------------------------------------------------------------------------------


def command_line(trial: Trial, folder: Path) -> list[str]:
    """The options of pretrain.py, after writing the preset and the DeepSpeed JSON that they name into `folder`."""
    write_json(folder / "preset.json", trial.model.model_dump())
    write_json(folder / "ds_config.json", trial.recipe.json)
    words = [
        "--preset", folder / "preset.json", "--ds_config", folder / "ds_config.json", "--run_dir", folder / "run",
        "--steps", trial.steps, "--seed", trial.seed,
    ]  # fmt: skip
    options: dict[str, Any] = {"eval_interval": 0, "save_interval": 0, **trial.options}
    for name, value in options.items():
        if value is not False:
            words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [value])]
    return list(map(str, words))


def train(trial: Trial, folder: Path, threads: int) -> dict[str, Any]:
    """Train it in `folder`, whose checkpoints are removed; returns its line of results. Raises UserError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    launch = [sys.executable, ROOT / "megamoe/pretrain.py"]
    if trial.ranks > 1:
        launch = [ROOT / "launch_scripts/single_node.sh", trial.ranks]
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), **os.environ}
    with open(folder / "output.txt", "w") as output:
        command = [*map(str, launch), *command_line(trial, folder)]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        lines = (folder / "output.txt").read_text().splitlines()
        why = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no output")
        raise UserError(f"{trial.name}, seed {trial.seed}: exited with code {code}: {why} (see {folder}/output.txt)")
    shutil.rmtree(folder / "run" / "checkpoints")
    return {**named(trial), **results(trial, read_log(folder / "run"))}


def named(trial: Trial) -> dict[str, Any]:
    """What the line of a run tells it by."""
    return {**{name: getattr(trial, name) for name in KEY}, "recipe": trial.digest}


def results(trial: Trial, log: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What a run has come to."""
    rows, last = log["train"], log["valid"][-1] if log["valid"] else {}
    begins = next(index for index, row in enumerate(rows) if row["step"] >= trial.steps / 10)
    seq_len = trial.options.get("seq_len", trial.model.max_position_embeddings)
    steps = [row["step"] for row in rows]
    file = trial.options.get("data_schedule")
    given = read_phases(file) if file else [PhaseSettings()]
    phases = make_phases(given, data=[], seq_len=seq_len, micro_batch=1, samples=trial.recipe.samples, world_size=1)
    tokens = [after - before for before, after in pairwise(map(phases.tokens_before, (s + 1 for s in [0, *steps])))]
    return {
        "tokens": sum(tokens),
        "parameters": parameter_count(trial.model),
        "flops_per_token": train_flops_per_token(trial.model, seq_len),
        "loss": rows[-1]["loss"],
        "held_out": {name: value for name, value in last.items() if name != "step"},
        "running_max_vio": rows[-1]["running_max_vio"],
        "highest_max_vio": max(row["running_max_vio"] for row in rows[begins:]),  # from a tenth of the run on
        "tokens_per_second": median(row["tokens_per_second"] for row in rows),
        "seconds": sum(count / row["tokens_per_second"] for count, row in zip(tokens, rows, strict=True)),
    }


def check_jobs(trials: list[Trial]) -> None:
    """Raise UserError for files, sizes and options with which a run would end before its first step: each sentence
    once, with the names of its changes."""
    device, precision = _device()
    found: dict[str, list[str]] = {}
    for trial in {trial.name: trial for trial in trials}.values():
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = parse_run(command_line(trial, Path(folder)))
                check_run(run, trial.ranks, device, precision, leads=False, scans=False)
            except UserError as error:
                for problem in error.problems:
                    found.setdefault(problem.replace(f"{folder}/", ""), []).append(trial.name)
    if found:
        raise UserError(*(f"{', '.join(names)}: {problem}" for problem, names in found.items()))


def train_all(trials: list[Trial], lines: Path, work: Path, parallel: int) -> list[str]:
    """Train those of which `lines` holds no result yet, and append theirs; returns what went wrong.
    Raises UserError where a result is of another recipe than the table has now, and where a run could not begin."""
    done = {_key_of(line): line["recipe"] for line in read_lines(lines)}
    others = [trial.name for trial in trials if done.get(trial.key, trial.digest) != trial.digest]
    if others:
        raise UserError(
            f"{lines} has results of {', '.join(dict.fromkeys(others))} with another preset, DeepSpeed JSON or options "
            "than the table names now; give another --out."
        )
    waiting = [trial for trial in trials if trial.key not in done]
    check_jobs(waiting)
    if waiting:
        print(f"{len(waiting)} of {len(trials)} runs to train; see {work}/NAME-SEED/output.txt", flush=True)
    ranks = max((trial.ranks for trial in waiting), default=1)
    threads = max(len(os.sched_getaffinity(0)) // (parallel * ranks), 1)
    lock = Lock()
    problems = Problems()

    def run(trial: Trial) -> None:
        result = problems.attempt(train, trial, work / f"{trial.name}-{trial.seed}", threads)
        if not result:
            return
        with lock, open(lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{trial.name}, seed {trial.seed}: {measure_of(result):.4f}, {result['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run, waiting))
    return problems


def end_with_runs(*_: object) -> None:
    """At SIGTERM: end the runs too, which a Ctrl-C reaches by itself."""
    for run in psutil.Process().children():
        run.terminate()
    os._exit(128 + signal.SIGTERM)


def _key_of(line: dict[str, Any]) -> str:
    return json.dumps([line[name] for name in KEY], sort_keys=True)


# --- the command line -----------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train every change of a table with every seed, and compare them.",
    )
    parser.add_argument("table", type=Path, help="JSON with a preset, a DeepSpeed JSON and changes of them")
    parser.add_argument("--steps", type=int, help="of a run, in place of the schedule's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="SEED", help="seeds to train with")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="changes to train; by default all")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of a run, on this host")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; they share this host's cores")
    parser.add_argument("--out", type=Path, help="JSON lines to append to; by default TABLE.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    return check(parser.parse_args())


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    for name in ("steps", "ranks", "parallel"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} is {value}; give at least 1.")
    if args.out and not args.out.parent.is_dir():
        problems.append(f"--out is {args.out}, whose folder does not exist; make it first.")
    problems.refuse()
    return args


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, end_with_runs)
    lines = args.out or args.table.with_suffix(".jsonl")
    trials = read_table(args.table, args.steps, args.ranks, args.seeds, args.only)
    problems = train_all(trials, lines, args.work, args.parallel)
    results = read_lines(lines)
    if results:
        groups = groups_of(results)
        draw(groups, lines.with_suffix(".png"))
        print(table_of(groups))
        print(f"plot: {lines.with_suffix('.png')}")
    if problems:
        raise UserError(*problems)


if __name__ == "__main__":
    cli.run(main)
