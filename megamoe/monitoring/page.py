"""A page in GitHub's Markdown on one run, or one that compares several."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any
from urllib.parse import quote

from megamoe.monitoring.evaluations import results
from megamoe.monitoring.names import flat_config
from megamoe.monitoring.run_state import RunState

HEAD = ("run", "parameters", "steps", "tokens", "loss", "held out", "bits/byte", "MaxVio", "tokens/s")
RESTARTS = ("resume", "rollback", "stop", "error", "death", "stall")  # events
COMPARED = ("world_size", "model", "run", "deepspeed", "versions")  # of the records
NOT_COMPARED = ("run.run_dir", "run.resume", "run.auto_resume")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In columns that a terminal shows as well."""
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(f"{one:{width}}" for one, width in zip(row, widths, strict=True)) + " |" for row in cells
    )


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:,}" if type(value) is int else str(value)
    return " ".join(text.split()).replace("|", r"\|")


def summary(runs: list[RunState]) -> str:
    """A row per run: its last logged step, its last evaluation, and its speed, the median of the logged steps."""
    rows = []
    for run in runs:
        train, held_out = run.log["train"], (run.held_out or [{}])[-1]
        last, speed = train[-1], median(row["tokens_per_second"] for row in train)
        losses = [value and f"{value:.4f}" for value in (last["loss"], *map(held_out.get, ("loss", "bits_per_byte")))]
        sizes = run.record.get("parameters"), last["step"], last.get("total_tokens")
        rows.append((run.name, *sizes, *losses, f"{last['running_max_vio']:.2f}", f"{speed:,.0f}"))
    return table(HEAD, rows)


def page(runs: list[RunState], picture: str) -> str:
    """The page, with the picture at this path from it."""
    more = _of_one(runs[0]) if len(runs) == 1 else _differences(runs)
    parts = (
        f"# {', '.join(run.name for run in runs)}",
        summary(runs),
        f"![loss, balance, rate, speed]({quote(picture)})",
        *more,
    )
    return "\n\n".join(parts) + "\n"


def _differences(runs: list[RunState]) -> Iterator[str]:
    found = [flat_config({key: run.record.get(key) for key in COMPARED}) for run in runs]
    names = [name for name in dict.fromkeys(key for one in found for key in one) if name not in NOT_COMPARED]
    rows = [(name, *(one.get(name) for one in found)) for name in names]
    yield table(["difference", *(run.name for run in runs)], [row for row in rows if row[1:] != row[1:2] * len(runs)])


def _of_one(run: RunState) -> Iterator[str]:
    if len(lines := [f"- {line}" for line in results(run.log["valid"])]) > 1:
        yield "\n".join(lines)
    if restarts := [_event_row(event) for event in run.events if event["event"] in RESTARTS]:
        yield table(("event", "after step", "time", "details"), restarts)
    for row in run.log["samples"][-1:]:
        yield f"Samples after step {row['step']}:"
        yield from (_verbatim(one["prompt"] + one["continuation"]) for one in row["samples"])
    record = run.record
    shape = f"{record.get('preset')} on {record.get('world_size', 1)} ranks, ep_size {record.get('ep_size', 1)}"
    yield f"{shape}; {', '.join(f'{name} {value}' for name, value in record.get('versions', {}).items())}:"
    yield _verbatim(shlex.join(run.command()))
    ds = _verbatim(json.dumps(record.get("deepspeed"), indent=1))
    yield f"<details><summary>DeepSpeed JSON</summary>\n\n{ds}\n\n</details>"


def _event_row(event: dict[str, Any]) -> list[Any]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    details = (f"{key} {value}" for key, value in event.items() if key not in ("event", "step", "time", "seen"))
    return [event["event"], event["step"], when, ", ".join(details)]


def _verbatim(text: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}\n{text}\n{fence}"
