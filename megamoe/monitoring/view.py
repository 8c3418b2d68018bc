"""A run in a terminal: what `megamoe status` and the live view of `megamoe train` show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megamoe.monitoring.log_files import ENDS
from megamoe.monitoring.run_state import RunState, age, since
from megamoe.utils.text import duration

BLOCKS = " ▁▂▃▄▅▆▇█"
POINTS = 8  # of a long series in a cell, at most
# MaxVio of a layer from which it has a color: see "healthy ranges" of docs/reference/log.md.
COLORS = ((2.0, "red"), (1.0, "dark_orange"), (0.5, "yellow"), (0.0, "green"))
STYLES = {"running": "green", "done": "green", "stopped": "yellow", "not": "yellow", "locked": "yellow"}  # of a state
EVENTS_SHOWN, QUIET = 3, ("save", "first_step", "end")


class Row(NamedTuple):
    name: str
    value: str
    graph: RenderableType = ""


class Area:
    """A series as an area, of a cell for each value or as wide as there is room."""

    def __init__(self, values: Iterable[float], style: str, height: int = 1):
        self._values = [value for value in values if math.isfinite(value)]
        self._height, self._style = height, style

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        number = len(self._values)
        cells = min(options.max_width, number)
        spans = pairwise(number * cell // cells for cell in range(cells + 1)) if cells else []
        means = [fmean(self._values[start : end : max((end - start) // POINTS, 1)]) for start, end in spans]
        # The first steps have a loss so high that everything after them would be flat.
        low, high = min(means, default=0.0), sorted(means)[-1 - cells // 16] if means else 0.0
        most = 8 * self._height - 2  # above the lowest; an eighth stays free, between this row and the one above
        scale = most / (high - low) if high > low else 0.0
        eighths = [1 + min(round((mean - low) * scale), most) for mean in means]
        for row in reversed(range(self._height)):
            yield Text("".join(BLOCKS[min(max(one - 8 * row, 0), 8)] for one in eighths), style=self._style)


def rows(state: RunState) -> Iterator[Row]:
    """What there is to say, by name."""
    record, log, saved = state.record, state.log, state.checkpoint
    ranks = record.get("world_size", 1)
    split = f"{ranks} rank{'s' * (ranks > 1)}, ep_size {record.get('ep_size', 1)}"
    yield Row("run", f"{state.folder}, begun or resumed {record.get('time')}")
    yield Row("model", f"{record.get('preset')}, {record.get('parameters', 0):,} parameters on {split}")
    yield Row("state", state.state())
    of_last = f" of {state.last_step:,}" if state.last_step else ""
    if log["train"]:
        left = f", {duration(log['train'][-1]['seconds_left'])} left" if state.holder else ""
        yield Row("step", f"{log['train'][-1]['step']:,}{of_last}{left}, logged {age(state.folder / 'log.jsonl')} ago")
        yield from _values(log["train"], state.held_out)
    else:
        yield Row("step", f"none is logged yet{of_last and ','}{of_last}")
    yield Row("checkpoint", f"{saved.name}, saved {age(saved)} ago" if saved else "none yet")
    if command := state.next_command():
        yield Row(*command)


def _values(train: list[dict[str, Any]], valid: list[dict[str, Any]]) -> Iterator[Row]:
    now = train[-1]
    yield Row("loss", f"{now['loss']:.4f}", Area((row["loss"] for row in train), "cyan", height=3))
    if valid:
        value = f"{valid[-1]['loss']:.4f} at step {valid[-1]['step']:,}"
        yield Row("held out", value, Area((row["loss"] for row in valid), "magenta"))
    yield Row("rate", f"{now['lr']:.6g}", Area((row["lr"] for row in train), "blue"))
    yield Row("MaxVio", f"{now['max_vio']:.2f}, running {now['running_max_vio']:.2f}", _strip(now))
    speeds = Area((row["tokens_per_second"] for row in train), "bright_black")
    yield Row("speed", f"{now['tokens_per_second']:,.0f} tokens/s, MFU {now['mfu']:.1%}", speeds)
    yield Row("memory", f"{now['memory_gib']:.2f} GiB")


def _strip(now: dict[str, Any]) -> Text:
    """A cell for each layer, by its running MaxVio."""
    strip = Text()
    for value in now.get("running_max_vio_by_block", {}).values():
        style = next((color for limit, color in COLORS if value >= limit), "dim")
        strip.append(BLOCKS[1 + min(int(value * 3.5), 7)], style=style)
    return strip


def render(state: RunState, activity: str | None = None) -> RenderableType:
    """All of it with graphs, the last events and a bar, on 24 lines of a terminal or so.

    Args:
        activity: what the run is doing, where that is known better than from its files.
    """
    said = {row.name: row for row in rows(state)}
    step = state.log["train"][-1]["step"] if state.log["train"] else 0
    bar = ProgressBar(state.last_step or step, step, complete_style="cyan", finished_style="cyan")
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(style="dim")
    grid.add_column(min_width=20)
    grid.add_column(ratio=1)
    for name in ("loss", "held out", "rate", "MaxVio", "speed", "memory", "checkpoint"):
        if name in said:
            grid.add_row(*said[name])
    told = [one for one in state.events if one["event"] not in QUIET]
    if told and told[-1]["event"] in ENDS:  # which the state says
        del told[-1]
    what = activity or said["state"].value
    doing = Text(what, style=STYLES.get(what.split()[0].strip(":"), "bold red"))
    head = Text.assemble((str(state.folder), "bold"), "  ", (said["model"].value, "dim"))
    command = [Text.assemble((f"{name}: ", "dim"), said[name].value) for name in ("next", "go on") if name in said]
    top = "", head, Text(f"step {said['step'].value}"), bar, ""
    return Group(*top, grid, "", *map(_event, told[-EVENTS_SHOWN:]), "", doing, *([] if activity else command))


def _event(event: dict[str, Any]) -> Text:
    why = f": {event['reason']}" if event.get("reason") else ""
    what = f"{event['event'].replace('_', ' ')} at step {event['step']:,}{why}"
    return Text.assemble((f"{since(event['time'])} ago  ", "dim"), what, no_wrap=True, overflow="ellipsis")
