"""Show what runs have done: their losses, and a picture of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from pydantic import Field

from megamoe.config.cli import Options, Positional
from megamoe.monitoring.log_files import read_log
from megamoe.utils.errors import Problems, UserError

ROWS = 16  # of the loss table, at most


class Report(Options):
    runs: Positional[list[Path]] = Field(description="folders of runs")
    out: Path | None = Field(default=None, description="PNG to draw, of one run; by default RUN/loss_lr.png")


def read_run(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The log of a run that has trained. Raises UserError."""
    if not (run_dir / "log.jsonl").is_file():
        raise UserError(f"{run_dir} holds no log.jsonl; give the folder of a run.")
    log = read_log(run_dir)
    if not log["train"]:
        raise UserError(f"{run_dir}/log.jsonl holds no step yet; wait for the first one.")
    return log


def loss_table(log: dict[str, list[dict[str, Any]]]) -> str:
    """Step, training loss, held-out loss, learning rate and balance: lines evenly spaced over the run, half of
    them at most for evaluations."""
    rows = log["train"]
    valid = {record["step"]: record for record in log["valid"]}
    if len(rows) > ROWS:
        evaluated = _thinned([row for row in rows if row["step"] in valid], ROWS // 2)
        even = [row for row in _thinned(rows, ROWS - len(evaluated)) if row not in evaluated]
        rows = sorted(even + evaluated, key=lambda row: row["step"])
    sets = further_sets(log["valid"])
    widths = {name: max(len(name), 8) for name in sets}
    columns = "".join(f" {name:>{width}}" for name, width in widths.items())
    lines = [f"{'step':>7} {'loss':>8} {'valid':>8} {'bits/byte':>9}{columns} {'lr':>11} {'MaxVio':>7} {'tok/s':>8}"]
    for row in rows:
        held_out = valid.get(row["step"], {})
        columns = "".join(f" {cell(held_out.get(f'{name}_loss')):>{width}}" for name, width in widths.items())
        lines.append(
            f"{row['step']:>7} {row['loss']:>8.4f} {cell(held_out.get('loss')):>8} "
            f"{cell(held_out.get('bits_per_byte')):>9}{columns} {row['lr']:>11.6g} "
            f"{row['running_max_vio']:>7.2f} {row['tokens_per_second']:>8.0f}"
        )
    return "\n".join(lines)


def _thinned(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most so many, evenly spaced, with the last."""
    every = max(-(-len(rows) // limit), 1)
    return rows[::-1][::every][::-1]


def further_sets(valid: list[dict[str, Any]]) -> list[str]:
    """Names of the held-out sets after the first, in their order."""
    return list(dict.fromkeys(key.removesuffix("_loss") for row in valid for key in row if key.endswith("_loss")))


def description(name: str) -> str:
    """Which values a set's name stands for, as the end of a phrase; "" is the first set."""
    is_averaged = name == "ema" or name.startswith("ema_")
    name = name[len("ema_") :] if is_averaged else name
    return (f" on {name}" if name else "") + (" with averaged weights" if is_averaged else "")


def task_values(valid: list[dict[str, Any]]) -> list[str]:
    """Names of the values of tasks."""
    sets = further_sets(valid)
    others = {"kind", "step", "loss", "tokens", "bits_per_byte"}
    others |= {f"{name}_{value}" for name in sets for value in ("loss", "bits_per_byte")}
    return list(dict.fromkeys(key for row in valid for key in row if key not in others))


def points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of those rows that have one."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def draw(log: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss, learning rate and expert balance over the steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, valid = log["train"], log["valid"]
    steps = [row["step"] for row in train]
    tasks = task_values(valid)
    rows = 4 if tasks else 3
    figure, (loss, rate, balance, *scores) = pyplot.subplots(
        rows, 1, sharex=True, figsize=(8, 3 * rows), layout="constrained"
    )
    loss.plot(steps, [row["loss"] for row in train], label="training")
    sets = further_sets(valid)
    names = {"loss": "held out", **{f"{name}_loss": f"held out{description(name)}" for name in sets}}
    for key, label in names.items():
        if points(valid, key)[0]:
            loss.plot(*points(valid, key), "o-", label=label)
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    rate.plot(steps, [row["lr"] for row in train], color="tab:green")
    rate.set_ylabel("learning rate")
    balance.plot(steps, [row["max_vio"] for row in train], alpha=0.5, label="step")
    balance.plot(steps, [row["running_max_vio"] for row in train], label="running, mean of layers")
    balance.plot(steps, [row["worst_running_max_vio"] for row in train], ":", label="running, worst layer")
    balance.set_ylabel("MaxVio (0 is balanced)")
    balance.set_ylim(bottom=0)
    balance.legend()
    for axes in scores:
        for key in tasks:
            axes.plot(*points(valid, key), "o-", label=key)
        axes.set_ylabel("tasks")
        axes.legend()
    (scores or [balance])[0].set_xlabel("step")
    return figure


def results(valid: list[dict[str, Any]]) -> Iterator[str]:
    """The last evaluation of each held-out set, and of the tasks."""
    for name in ("", *further_sets(valid)):
        prefix = f"{name}_" if name else ""
        last = next((row for row in reversed(valid) if f"{prefix}loss" in row), None)
        if last:
            bits = f", {last[f'{prefix}bits_per_byte']:.4f} bits per byte" if f"{prefix}bits_per_byte" in last else ""
            loss = f"{last[f'{prefix}loss']:.4f} nats per token{bits}"
            yield f"validation{description(name)} at step {last['step']}: {loss}"
    for key in task_values(valid):
        steps, values = points(valid, key)
        yield f"{key} at step {steps[-1]}: {values[-1]:.4f}"


def show(run_dir: Path, log: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    draw(log).savefig(picture, dpi=120, format="png")
    print(loss_table(log))
    for line in results(log["valid"]):
        print(line)
    for what, place in (
        ("checkpoints", run_dir / "checkpoints"),
        ("plot", picture),
        ("log", run_dir / "log.jsonl"),
        ("TensorBoard", run_dir / "tensorboard"),
        ("configuration", run_dir / "run.json"),
    ):
        print(f"{what:>14}: {place}")


def report(options: Report) -> None:
    problems = Problems()
    if options.out and len(options.runs) > 1:
        problems.append(f"--out is given with {len(options.runs)} runs; give one run, or leave it out.")
    logs = {run_dir: problems.attempt(read_run, run_dir) for run_dir in options.runs}
    problems.refuse()
    for run_dir, log in logs.items():
        show(run_dir, log, options.out or run_dir / "loss_lr.png")
