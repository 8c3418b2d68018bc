"""Measure what a change of the recipe is worth: `python tools/ablate.py docs/results/tiny_screen.json --steps 217`.

TABLE.json names a preset, a DeepSpeed JSON and changes of them:

    {"preset": "tiny", "ds_config": "ds_configs/tiny.json",
     "options": {"data": "data/shakespeare", "eval_samples": 1000},
     "changes": {"qk-norm": {"preset": {"qk_norm": "head"}},
                 "beta2": {"ds_config": {"optimizer.params.betas": [0.9, 0.99]}},
                 "long": {"steps": 400, "options": {"seq_len": 512}}}}

Every change is trained with every seed, and so is "baseline", without any. A run that has ended is one JSON line in
TABLE.jsonl, and is not repeated by the next call. The table of all lines is printed and drawn in TABLE.png.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from threading import Lock
from typing import Any

import matplotlib

from megamoe import cli
from megamoe.architectures.config_json import find_preset
from megamoe.config import ModelConfig, validate
from megamoe.data.ramp import BatchRamp
from megamoe.ds_config import batch_sizes, section_of
from megamoe.errors import Problems, UserError, shown, unknown_key
from megamoe.json_files import read_json, write_json
from megamoe.model.costs import parameter_count, train_flops_per_token
from megamoe.resume_rules import stages_of
from megamoe.run_config import RunConfig, parse_stage
from megamoe.schedule_config import read_schedule
from megamoe.training.sinks import read_log

ROOT = Path(__file__).parents[1]
BASELINE = "baseline"
TABLE_KEYS = ("preset", "ds_config", "options", "changes")
CHANGE_KEYS = ("preset", "ds_config", "options", "steps", "ranks")
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
    ds: dict[str, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """What tells it from other runs in the lines of results."""
        return json.dumps([self.name, self.seed, self.steps, self.change], sort_keys=True)

    @property
    def recipe(self) -> str:
        """A hash of all that it trains with."""
        whole = json.dumps([self.model.model_dump(), self.ds, self.options], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


# --- the table ------------------------------------------------------------------------------------------------------


def read_table(path: Path, steps: int | None, ranks: int, seeds: list[int], only: list[str]) -> list[Trial]:
    """The runs that a table asks for. Raises one UserError with all its problems.

    Args:
        steps: of a run whose change names no other number; by default those of the schedule. The schedule ends there.
        only: names of changes; empty for all.
    """
    table = read_json(path)
    changes = {BASELINE: {}, **table.get("changes", {})}
    problems = Problems(unknown_key(str(path), key, TABLE_KEYS) for key in table if key not in TABLE_KEYS)
    problems += [unknown_key(f"{path}: changes", name, changes, "change") for name in only if name not in changes]
    preset = problems.attempt(find_preset, str(table.get("preset", "tiny")))
    ds = problems.attempt(read_json, Path(table.get("ds_config", "ds_configs/tiny.json")))
    problems.refuse()
    problems += [
        f'{path}: change "{name}" is {shown(change)}; give an object with some of {", ".join(CHANGE_KEYS)}.'
        for name, change in changes.items()
        if not isinstance(change, dict)
    ]
    problems.refuse()
    trials = []
    for name, change in changes.items():
        trial = problems.attempt(_trial, f"{path}: {name}", name, change, preset, ds, table.get("options", {}), steps)
        trials += [Trial(name, seed, change.get("ranks", ranks), *trial) for seed in seeds if trial]
    problems.refuse()
    return [trial for trial in trials if not only or trial.name in only]


def _trial(
    where: str, name: str, change: dict[str, Any], preset: ModelConfig, ds: dict[str, Any], options: Any, steps: Any
) -> tuple[int, dict[str, Any], ModelConfig, dict[str, Any], dict[str, Any]]:
    """(steps, change, model, DeepSpeed JSON, options) of one change. Raises UserError."""
    problems = Problems(unknown_key(where, key, CHANGE_KEYS) for key in change if key not in CHANGE_KEYS)
    model = problems.attempt(validate, ModelConfig, {**preset.model_dump(), **change.get("preset", {})}, where)
    options = {**options, **change.get("options", {})}
    for option in options:
        if option in OWN_OPTIONS:
            problems.append(f"{where}: option {option} is given by the runner; leave it out.")
        elif option not in RunConfig.model_fields:
            problems.append(unknown_key(f"{where}: options", option, RunConfig.model_fields, "option"))
    problems.refuse()
    ds = copy.deepcopy(ds)
    steps = change.get("steps", steps)
    params = section_of(section_of(ds, "scheduler"), "params")
    if steps and "total_num_steps" in params:  # a constant rate has no end
        params["total_num_steps"] = steps
    for key, value in change.get("ds_config", {}).items():
        _set(ds, key, value, where)
    schedule = read_schedule(ds, where)
    steps = steps or schedule.total_steps
    if steps is None:
        raise UserError(f"{where}: its schedule has no end; give --steps, or a change's own steps.")
    return steps, change, model, ds, options


def _set(values: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set the value at a path of keys with dots between them; null removes it. Raises UserError."""
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(
                f'{where}: ds_config: "{section}" of {path} is {shown(values)}, no section; change the path.'
            )
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value


# --- a run ----------------------------------------------------------------------------------------------------------


def train(trial: Trial, folder: Path, threads: int) -> dict[str, Any]:
    """Train it in `folder`, whose checkpoints are removed; returns its line of results. Raises UserError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "preset.json", trial.model.model_dump())
    write_json(folder / "ds_config.json", trial.ds)
    words = [
        "--preset", folder / "preset.json", "--ds_config", folder / "ds_config.json", "--run_dir", folder / "run",
        "--steps", trial.steps, "--seed", trial.seed,
    ]  # fmt: skip
    options: dict[str, Any] = {"eval_interval": 0, "save_interval": 0, **trial.options}
    for name, value in options.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [value])]
    launch = [sys.executable, ROOT / "megamoe/pretrain.py"]
    if trial.ranks > 1:
        launch = [ROOT / "launch_scripts/single_node.sh", trial.ranks]
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), **os.environ}
    with open(folder / "output.txt", "w") as output:
        command = [str(word) for word in [*launch, *words]]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        lines = (folder / "output.txt").read_text().splitlines()
        why = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no output")
        raise UserError(f"{trial.name}, seed {trial.seed}: exited with code {code}: {why} (see {folder}/output.txt)")
    shutil.rmtree(folder / "run" / "checkpoints")
    return {**_named(trial), **results(trial, read_log(folder / "run"))}


def _named(trial: Trial) -> dict[str, Any]:
    named = {key: asdict(trial)[key] for key in ("name", "seed", "steps", "ranks", "change")}
    return {**named, "recipe": trial.recipe}


def results(trial: Trial, log: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What a run has come to."""
    rows, last = log["train"], log["valid"][-1] if log["valid"] else {}
    begins = next(index for index, row in enumerate(rows) if row["step"] >= trial.steps / 10)
    seq_len = trial.options.get("seq_len", trial.model.max_position_embeddings)
    micro_batch, accumulation = batch_sizes(trial.ds, trial.ranks)
    steps = [row["step"] for row in rows]
    stages = stages_of({"batch_ramp": [parse_stage(stage) for stage in trial.options.get("batch_ramp", [])]})
    ramp = BatchRamp(micro_batch * accumulation * trial.ranks, stages)
    samples = [ramp.samples_before(step + 1) for step in [0, *steps]]
    tokens = [(after - before) * seq_len for before, after in pairwise(samples)]
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


def train_all(trials: list[Trial], lines: Path, work: Path, parallel: int) -> list[str]:
    """Train those of which `lines` holds no result yet, and append theirs; returns what went wrong.
    Raises UserError where a result is of another recipe than the table has now."""
    done = {_key_of(line): line.get("recipe") for line in read_lines(lines)}
    others = [trial.name for trial in trials if done.get(trial.key) not in (None, trial.recipe)]
    if others:
        raise UserError(
            f"{lines} has results of {', '.join(dict.fromkeys(others))} with another preset, DeepSpeed JSON or options "
            "than the table names now; give another --out."
        )
    waiting = [trial for trial in trials if trial.key not in done]
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _key_of(line: dict[str, Any]) -> str:
    return json.dumps([line["name"], line["seed"], line["steps"], line["change"]], sort_keys=True)


# --- what it says ---------------------------------------------------------------------------------------------------


def measure_of(line: dict[str, Any]) -> float:
    """What runs are compared by: held-out bits per byte, or the loss where the bytes are not known."""
    held_out = line["held_out"]
    return held_out.get("bits_per_byte", held_out.get("loss", line["loss"]))


@dataclass(frozen=True)
class Group:
    """The runs of one change that differ by their seeds."""

    name: str
    lines: list[dict[str, Any]]

    @property
    def values(self) -> list[float]:
        return [measure_of(line) for line in self.lines]

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return stdev(self.values) if len(self.values) > 1 else None


def groups_of(lines: list[dict[str, Any]]) -> list[Group]:
    """The runs by change and number of steps, best change first."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["name"], line["steps"]), []).append(line)
    return sorted((Group(name, some) for (name, _), some in groups.items()), key=lambda group: mean(group.values))


def table_of(groups: list[Group]) -> str:
    """A line per change: its result, spread over seeds and difference to the baseline of as many steps."""
    width = max(len(group.name) for group in groups)
    base = {group.lines[0]["steps"]: mean(group.values) for group in groups if group.name == BASELINE}
    rows = [f"{'change':<{width}} {'steps':>6} {'seeds':>5} {'result':>8} {'spread':>7} {'change':>8} {'worst':>7} "
            f"{'MaxVio':>7} {'highest':>7} {'tok/s':>7}"]  # fmt: skip
    for group in groups:
        steps = group.lines[0]["steps"]
        spread = "" if group.spread is None else f"{group.spread:.4f}"
        difference = f"{mean(group.values) - base[steps]:+.4f}" if steps in base else ""
        rows.append(
            f"{group.name:<{width}} {steps:>6} {len(group.lines):>5} {mean(group.values):>8.4f} {spread:>7} "
            f"{difference:>8} {max(group.values):>7.4f} {_mean(group, 'running_max_vio'):>7.3f} "
            f"{_mean(group, 'highest_max_vio'):>7.3f} {_mean(group, 'tokens_per_second'):>7.0f}"
        )
    return "\n".join(rows)


def _mean(group: Group, name: str) -> float:
    return mean(line[name] for line in group.lines)


def draw(groups: list[Group], path: Path) -> None:
    """The result of every change, a dot per seed and a bar over their spread, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.25 * len(groups)), layout="constrained")
    for row, group in enumerate(groups):
        color = "tab:orange" if group.name == BASELINE else "tab:blue"
        axes.plot(group.values, [row] * len(group.values), "o", color=color, markersize=4)
        if group.spread is not None:
            axes.errorbar(mean(group.values), row, xerr=group.spread, color=color, capsize=3)
        if group.name == BASELINE:
            axes.axvline(mean(group.values), color=color, linewidth=0.8)
    axes.set_yticks(range(len(groups)), [f"{group.name} ({group.lines[0]['steps']})" for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("held-out bits per byte, with the standard deviation over seeds")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Train every change of a table with every seed, and compare them.")
    parser.add_argument("table", type=Path, help="JSON with a preset, a DeepSpeed JSON and changes of them")
    parser.add_argument("--steps", type=int, help="of a run, in place of the schedule's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="SEED", help="seeds to train with")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="changes to train; by default all")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of a run, on this host")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="JSON lines to append to; by default TABLE.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    return parser.parse(check=check)


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    for name in ("steps", "ranks", "parallel"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} is {value}; give at least 1.")
    problems.refuse()
    return args


def main() -> None:
    args = parse()
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
