"""Show what a run has done: `python tools/report.py runs/tiny` prints its losses and draws RUN/loss_lr.png.

Of several runs, it prints a line each and draws losses and balance over the tokens of training, in comparison.png.
`--reference CURVE.tsv` compares one run with a curve of losses that was logged elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib

from megamoe.config import cli
from megamoe.data.batch_warmup import BatchWarmup
from megamoe.resume import stages_of
from megamoe.training.sinks import read_log
from megamoe.utils.errors import Problems, UserError, shown
from megamoe.utils.json_files import read_regular
from megamoe.utils.run_folder import last_record

ROWS = 16  # of the loss table, at most

# --- one run --------------------------------------------------------------------------------------------------------


def read_run(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The log of a run that has trained. Raises UserError."""
    if not (run_dir / "log.jsonl").is_file():
        raise UserError(f"{run_dir} holds no log.jsonl; give the folder of a run.")
    log = read_log(run_dir)
    if not log["train"]:
        raise UserError(f"{run_dir}/log.jsonl holds no step yet; wait for the first one.")
    return log


def read_reference(path: Path) -> dict[int, float]:
    """Loss by step, from the first two columns of a table with tabs and a line of names. Raises UserError."""
    text = read_regular(path, "a table of step and loss").decode(errors="replace")
    curve: dict[int, float] = {}
    for number, line in enumerate(text.splitlines()[1:], start=2):
        if not line.strip():
            continue
        try:
            step, loss, *_ = line.split("\t")
            curve[int(step)] = float(loss)
        except ValueError:
            raise UserError(
                f"{path}: line {number} is {shown(line)}; give a step, a tab and a loss in each line."
            ) from None
    if not curve or not all(map(math.isfinite, curve.values())):
        raise UserError(f"{path} has no step below its line of names, or a loss that is not finite; give finite ones.")
    return curve


def against_reference(train: list[dict[str, Any]], reference: dict[int, float]) -> str:
    """At how many of the reference's steps that the run has logged its training loss is lower."""
    losses = {row["step"]: row["loss"] for row in train}
    both = [step for step in reference if step in losses]
    not_lower = [step for step in both if losses[step] >= reference[step]]
    line = f"training loss below the reference at {len(both) - len(not_lower)} of the {len(both)} steps that both have"
    return line + (f", not at {', '.join(map(str, not_lower[:10]))}" if not_lower else "")


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
        columns = "".join(f" {_cell(held_out.get(f'{name}_loss')):>{width}}" for name, width in widths.items())
        lines.append(
            f"{row['step']:>7} {row['loss']:>8.4f} {_cell(held_out.get('loss')):>8} "
            f"{_cell(held_out.get('bits_per_byte')):>9}{columns} {row['lr']:>11.6g} "
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


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def draw(log: dict[str, list[dict[str, Any]]], path: Path, reference: dict[int, float]) -> None:
    """Loss, learning rate and expert balance over the steps, as a PNG; with the loss by step of a reference, as far
    as the run has come."""
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
    if reached := [step for step in reference if step <= steps[-1]]:
        loss.plot(reached, [reference[step] for step in reached], "k.--", linewidth=1, label="reference")
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
    figure.savefig(path, dpi=120)


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


def show(run_dir: Path, log: dict[str, list[dict[str, Any]]], picture: Path, reference: dict[int, float]) -> None:
    draw(log, picture, reference)
    print(loss_table(log))
    if reference:
        print(against_reference(log["train"], reference))
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


# --- several --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run to compare with others."""

    name: str
    parameters: int
    seq_len: int
    warmup: BatchWarmup
    log: dict[str, list[dict[str, Any]]]

    def held_out(self) -> list[dict[str, Any]]:
        """The evaluations of its first held-out set."""
        return [row for row in self.log["valid"] if "loss" in row]

    def tokens(self, rows: list[dict[str, Any]]) -> list[int]:
        """Tokens trained on up to each of the rows."""
        return [self.warmup.samples_before(row["step"] + 1) * self.seq_len for row in rows]


def read_sized_run(run_dir: Path) -> Run:
    """A run with its size. Raises UserError."""
    log, record = read_run(run_dir), last_record(run_dir) or {}
    sizes: list[Any] = [record.get(key) for key in ("parameters", "seq_len", "samples_per_step")]
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(f"{run_dir}/run.json does not say how large the run is; bring the file back, or leave it out.")
    parameters, seq_len, samples = sizes
    return Run(str(run_dir), parameters, seq_len, BatchWarmup(samples, stages_of(record.get("run", {}))), log)


def comparison_table(runs: list[Run]) -> str:
    """A line per run: its last evaluation, its balance at the end, and its speed, the median of the logged steps."""
    width = max(len(run.name) for run in runs)
    head = (
        f"{'run':<{width}} {'parameters':>15} {'tokens':>15} {'valid':>8} {'bits/byte':>9} {'MaxVio':>7} {'tok/s':>9}"
    )
    lines = [head]
    for run in runs:
        train, held_out = run.log["train"], (run.held_out() or [{}])[-1]
        lines.append(
            f"{run.name:<{width}} {run.parameters:>15,} {run.tokens(train)[-1]:>15,} "
            f"{_cell(held_out.get('loss')):>8} {_cell(held_out.get('bits_per_byte')):>9} "
            f"{train[-1]['running_max_vio']:>7.2f} {median(row['tokens_per_second'] for row in train):>9,.0f}"
        )
    return "\n".join(lines)


def draw_comparison(runs: list[Run], path: Path) -> None:
    """Losses and balance of the runs over the tokens of training, side by side, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, (loss, balance) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for run in runs:
        train, valid = run.log["train"], run.held_out()
        (line,) = loss.plot(run.tokens(train), [row["loss"] for row in train], alpha=0.4)
        loss.plot(run.tokens(valid), [row["loss"] for row in valid], "o-", color=line.get_color(), label=run.name)
        balance.plot(run.tokens(train), [row["running_max_vio"] for row in train], label=run.name)
    loss.set_ylabel("loss (nats per token; with dots: held out)")
    balance.set_ylabel("running MaxVio, mean of layers (0 is balanced)")
    balance.set_ylim(bottom=0)
    for axes in (loss, balance):
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = cli.Parser(description="Print a run's losses and draw them, or compare several runs.")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", type=Path, help="PNG to draw; by default RUN/loss_lr.png, or comparison.png here for several runs"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="TSV", help="losses of another run, to compare one run with: step, loss"
    )
    args = parser.parse()
    if args.out and args.out.suffix != ".png":
        raise UserError(f"--out is {args.out}; give it a name that ends in .png.")
    if len(args.run_dirs) == 1:
        (run_dir,) = args.run_dirs
        reference = read_reference(args.reference) if args.reference else {}
        show(run_dir, read_run(run_dir), args.out or run_dir / "loss_lr.png", reference)
        return
    if args.reference:
        raise UserError(f"--reference is given with {len(args.run_dirs)} runs; give one run, or leave it out.")
    problems = Problems()
    runs = [problems.attempt(read_sized_run, run_dir) for run_dir in args.run_dirs]
    problems.refuse()
    picture = args.out or Path("comparison.png")
    draw_comparison(runs, picture)
    print(comparison_table(runs))
    print(f"plot: {picture}")
