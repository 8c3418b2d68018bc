"""A run as one picture of characters, for a terminal: what `megamoe status` and `megamoe train` show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from statistics import fmean
from typing import Any

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
# MaxVio of a layer from which it has a colour: see "healthy ranges" of docs/reference/log.md.
COLORS = ((2.0, "red"), (1.0, "dark_orange"), (0.5, "yellow"), (0.0, "green"))
STYLES = {"running": "green", "done": "green", "stopped": "yellow", "not": "yellow", "locked": "yellow"}  # of a state
EVENTS_SHOWN, QUIET = 3, ("save", "first_step", "end")


class Area:
    """A series as an area as wide as there is room."""

    def __init__(self, values: Iterable[float], height: int = 1, style: str = "cyan"):
        self._values = [value for value in values if math.isfinite(value)]
        self._height, self._style = height, style

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        cells = self._cells(options.max_width)
        ordered = sorted(cells)
        # The first steps have a loss so high that everything after them would be flat.
        low, high = min(cells, default=0.0), ordered[-1 - len(ordered) // 16] if ordered else 0.0
        most = 8 * self._height - 2  # above the lowest; an eighth stays free, between this row and the one above
        scale = most / (high - low) if high > low else 0.0
        eighths = [1 + min(round((value - low) * scale), most) for value in cells]
        for row in reversed(range(self._height)):
            yield Text("".join(BLOCKS[min(max(one - 8 * row, 0), 8)] for one in eighths), style=self._style)

    def _cells(self, width: int) -> list[float]:
        number = len(self._values)
        count = min(width, number)
        ends = [number * cell // count for cell in range(count + 1)] if count else []
        return [fmean(self._values[start : end : max((end - start) // POINTS, 1)]) for start, end in pairwise(ends)]


def render(state: RunState, activity: str | None = None) -> RenderableType:
    """Everything of a run that fits a small terminal.

    Args:
        activity: what it is doing, where that is known better than from its files.
    """
    head = Text.assemble((str(state.folder), "bold"), "  ", (state.describe(), "dim"))
    parts: list[RenderableType] = ["", head, _progress(state), ""]
    if state.log["train"]:
        parts += [_values(state), ""]
    told = [one for one in state.events if one["event"] not in QUIET]
    if told and told[-1]["event"] in ENDS:  # which the state says
        del told[-1]
    parts += [*map(_event, told[-EVENTS_SHOWN:]), ""]
    what = activity or state.state()
    parts.append(Text(what, style=STYLES.get(what.split(":")[0].split()[0], "bold red")))
    if not activity and (command := state.next_command()):
        parts.append(Text.assemble((f"{command[0]}: ", "dim"), command[1]))
    return Group(*parts)


def _progress(state: RunState) -> RenderableType:
    now = state.log["train"][-1] if state.log["train"] else {"step": 0, "seconds_left": math.nan}
    last = state.last_step or now["step"]
    left = f"{duration(now['seconds_left'])} left" if state.holder and math.isfinite(now["seconds_left"]) else ""
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    table.add_column(ratio=1)
    table.add_row(
        ProgressBar(total=last, completed=now["step"], complete_style="cyan", finished_style="cyan"),
        f"step {state.progress()}", f"{now['step'] / max(last, 1):.0%}", left,
    )  # fmt: skip
    return table


def _values(state: RunState) -> Table:
    rows, valid = state.log["train"], [row for row in state.log["valid"] if "loss" in row]
    now = rows[-1]

    def series(key: str) -> Iterator[float]:
        return (row[key] for row in rows)

    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(min_width=20)
    table.add_column(ratio=1)
    table.add_row("loss", Text(f"{now['loss']:.4f}", style="bold"), Area(series("loss"), height=3))
    if valid:
        value = f"{valid[-1]['loss']:.4f} at {valid[-1]['step']:,}"
        table.add_row("held out", value, Area((row["loss"] for row in valid), style="magenta"))
    table.add_row("rate", f"{now['lr']:.6g}", Area(series("lr"), style="blue"))
    table.add_row("MaxVio", f"{now['running_max_vio']:.2f}, worst {now['worst_running_max_vio']:.2f}", _strip(now))
    table.add_row("tokens/s", f"{now['tokens_per_second']:,.0f}, MFU {now['mfu']:.1%}",
                  Area(series("tokens_per_second"), style="bright_black"))  # fmt: skip
    table.add_row("memory", f"{now['memory_gib']:.2f} GiB")
    saved = state.checkpoint
    table.add_row("saved", f"{saved.name}, {age(saved)} ago" if saved else "nothing yet")
    return table


def _strip(now: dict[str, Any]) -> Text:
    """A cell for each layer, by its running MaxVio."""
    strip = Text()
    for value in now.get("running_max_vio_by_block", {}).values():
        style = next((color for limit, color in COLORS if value >= limit), "dim")
        strip.append(BLOCKS[1 + min(int(value * 3.5), 7)], style=style)
    return strip


def _event(event: dict[str, Any]) -> Text:
    why = f": {event['reason']}" if event.get("reason") else ""
    what = f"{event['event'].replace('_', ' ')} at step {event['step']:,}{why}"
    return Text.assemble((f"{since(event['time'])} ago  ", "dim"), what, no_wrap=True, overflow="ellipsis")
