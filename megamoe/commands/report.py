"""Show what runs have done: their losses, a picture, and a page of Markdown for a pull request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from megamoe.config.cli import Options, Positional
from megamoe.monitoring.curves import draw
from megamoe.monitoring.evaluations import further_sets, results
from megamoe.monitoring.page import page, summary
from megamoe.monitoring.run_state import RunState
from megamoe.utils.errors import Problems, UserError

ROWS = 16  # of the loss table, at most


class Report(Options):
    runs: Positional[list[Path]] = Field(description="folders of runs; several are compared")
    out: Path | None = Field(
        default=None,
        description="page to write, a name in .md, with its picture next to it, or the folder of report.md; by default "
        "the run's folder, and of several runs this one",
    )


def read_run(folder: Path) -> RunState:
    """A run that has trained. Raises UserError."""
    run = RunState(folder)
    if not run.log["train"]:
        raise UserError(f"{folder} holds no logged step yet; wait for it, or restore its log.jsonl, if damaged.")
    return run


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


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def report(options: Report) -> None:
    problems = Problems()
    runs = [problems.attempt(read_run, run_dir) for run_dir in options.runs]
    problems.refuse()
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    out = options.out or (options.runs[0] if len(runs) == 1 else Path())
    text = out if out.suffix == ".md" else out / "report.md"
    picture = text.with_suffix(".png")
    try:
        text.parent.mkdir(parents=True, exist_ok=True)
        draw(runs).savefig(picture, dpi=120, format="png")
        text.write_text(page(runs, picture.name), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{text} cannot be written ({error.strerror}); choose another --out.") from None
    places = [("report", text), ("picture", picture)]
    if len(runs) > 1:
        print(summary(runs))
    else:
        run_dir = options.runs[0]
        print("\n".join([loss_table(runs[0].log), *results(runs[0].log["valid"])]))
        places.insert(0, ("checkpoints", run_dir / "checkpoints"))
        places += [("log", run_dir / "log.jsonl"), ("TensorBoard", run_dir / "tensorboard")]
        places += [("configuration", run_dir / "run.json")]
    for what, place in places:
        print(f"{what:>14}: {place}")
