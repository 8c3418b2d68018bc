"""What the run in a folder is doing, or how it ended, from its files alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field
from rich.console import Console
from rich.live import Live

from megamoe.config.cli import Options, Positional
from megamoe.monitoring.run_state import RunState, age
from megamoe.monitoring.view import render
from megamoe.utils.text import duration


class Status(Options):
    run: Positional[Path] = Field(default=Path("runs"), description="folder of a run, or of several")
    follow: Annotated[bool, Parameter(alias="-f")] = Field(
        default=False, description="in a terminal, show it anew every second until the run ends"
    )


def status(options: Status) -> None:
    runs = sorted(path.parent for path in options.run.glob("*/run.json"))
    if runs and not (options.run / "run.json").is_file():
        for one in map(RunState, runs):
            loss = [f"loss {row['loss']:.4f}  " for row in one.log["train"][-1:]]
            print(f"{one.folder}  step {one.progress()}  {''.join(loss)}{one.state()}")
        return
    state, console = RunState(options.run), Console()
    if not (sys.stdout.isatty() and console.is_interactive):
        for name, value in rows(state):
            print(f"{name:<10}  {value}")
    elif not options.follow:
        console.print(render(state))
    else:
        with Live(render(state), console=console, auto_refresh=False) as live:
            while state.holder:
                time.sleep(1)
                state.refresh()
                live.update(render(state), refresh=True)


def rows(state: RunState) -> Iterator[tuple[str, str]]:
    """What there is to say, by name."""
    yield "run", f"{state.folder}, begun or resumed {state.record.get('time')}"
    yield "model", state.describe()
    yield "state", state.state()
    yield from _progress(state)
    saved = state.checkpoint
    yield "checkpoint", f"{saved}, complete, saved {age(saved)} ago" if saved else "none yet"
    if command := state.next_command():
        yield command


def _progress(state: RunState) -> Iterator[tuple[str, str]]:
    log = state.log
    if not log["train"]:
        yield "step", f"none is logged yet{f', of {state.last_step:,}' if state.last_step else ''}"
        return
    now = log["train"][-1]
    left = f", {duration(now['seconds_left'])} left" if state.holder else ""
    yield "step", f"{state.progress()}{left}, logged {age(state.folder / 'log.jsonl')} ago"
    held_out = next((row for row in reversed(log["valid"]) if "loss" in row), None)
    valid = f"; held out {held_out['loss']:.4f} after step {held_out['step']:,}" if held_out else ""
    yield "loss", f"{now['loss']:.4f}{valid}"
    yield "MaxVio", f"{now['max_vio']:.2f}, running {now['running_max_vio']:.2f}"
    yield "speed", f"{now['tokens_per_second']:,.0f} tokens/s"
