"""Compare runs: `python tools/dev/compare_runs.py runs/tiny runs/tiny-glm --out comparison.png`.

Prints a line for each and draws losses and balance over the tokens of training. With `--reference CURVE.tsv`, it
compares one run with a curve of losses that was logged elsewhere.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib

from megamoe.commands.report import cell, draw, read_run
from megamoe.config import cli
from megamoe.config.phases import Phase, Phases
from megamoe.utils.errors import Problems, UserError, shown
from megamoe.utils.json_files import read_regular
from megamoe.utils.run_folder import last_record


class Run(NamedTuple):
    """A run to compare with others."""

    name: str
    parameters: int
    phases: Phases
    log: dict[str, list[dict[str, Any]]]

    def held_out(self) -> list[dict[str, Any]]:
        """The evaluations of its first held-out set."""
        return [row for row in self.log["valid"] if "loss" in row]

    def tokens(self, rows: list[dict[str, Any]]) -> list[int]:
        """Tokens trained on up to each of the rows."""
        return [self.phases.tokens_before(row["step"] + 1) for row in rows]


def read_sized_run(run_dir: Path) -> Run:
    """A run with its size. Raises UserError."""
    log, record = read_run(run_dir), last_record(run_dir) or {}
    parameters, given = record.get("parameters"), record.get("phases")
    if not isinstance(parameters, int) or not given:
        raise UserError(f"{run_dir}/run.json does not say how large the run is; bring the file back, or leave it out.")
    phases = [
        Phase(one["first_step"], one["seq_len"], 1, one["samples_per_step"], one["samples_per_step"], ())
        for one in given
    ]
    return Run(str(run_dir), parameters, Phases(tuple(phases), 1), log)


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
            f"{cell(held_out.get('loss')):>8} {cell(held_out.get('bits_per_byte')):>9} "
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


# --- a reference ----------------------------------------------------------------------------------------------------


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


def compare_with_reference(run_dir: Path, reference: dict[int, float], picture: Path) -> None:
    """Print at how many steps the run is better, and draw the reference as far as the run has come."""
    log = read_run(run_dir)
    figure, last_step = draw(log), log["train"][-1]["step"]
    loss, reached = figure.axes[0], [step for step in reference if step <= last_step]
    loss.plot(reached, [reference[step] for step in reached], "k.--", linewidth=1, label="reference")
    loss.legend()
    figure.savefig(picture, dpi=120)
    print(against_reference(log["train"], reference))


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Compare runs with each other, or one with a curve of losses.",
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="PNG to draw")
    parser.add_argument("--reference", type=Path, metavar="TSV", help="losses to compare one run with: step, loss")
    args = check(parser.parse_args())
    if args.reference:
        compare_with_reference(args.run_dirs[0], read_reference(args.reference), args.out)
    else:
        problems = Problems()
        runs = [problems.attempt(read_sized_run, run_dir) for run_dir in args.run_dirs]
        problems.refuse()
        draw_comparison(runs, args.out)
        print(comparison_table(runs))
    print(f"plot: {args.out}")


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    if args.out.suffix != ".png":
        problems.append(f"--out is {args.out}; give it a name that ends in .png.")
    if args.reference and len(args.run_dirs) > 1:
        problems.append(f"--reference is given with {len(args.run_dirs)} runs; give one run, or leave it out.")
    problems.refuse()
    return args


if __name__ == "__main__":
    cli.run(main)
