"""What the run in a folder is doing, or how it ended, from its files alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field
from rich.console import Console
from rich.live import Live

from megamoe.checkpoint import folders
from megamoe.config.cli import Options, Positional
from megamoe.monitoring.live import is_wanted
from megamoe.monitoring.run_state import RunState
from megamoe.monitoring.view import render, rows


class Status(Options):
    run: Positional[Path] = Field(default=Path("runs"), description="folder of a run, or of several")
    follow: Annotated[bool, Parameter(alias="-f")] = Field(
        default=False, description="in a terminal, refresh it every second until the run ends"
    )


DEFAULTS = Status()


def status(options: Status = DEFAULTS) -> None:
    runs = sorted(path.parent for path in options.run.glob("*/run.json") if not folders.age_of(path.parent))
    if runs and not (options.run / "run.json").is_file():
        for one in runs:
            said = {row.name: row.value for row in rows(RunState(one))}
            print(f"{one}  step {said['step']}  loss {said.get('loss', '-')}  {said['state']}")
        return
    state = RunState(options.run)
    if not is_wanted():
        for name, value, _ in rows(state):
            print(f"{name:<10}  {value}")
    elif not options.follow:
        Console().print(render(state))
    else:
        with Live(render(state), auto_refresh=False) as live:
            while state.holder:
                time.sleep(1)
                state.refresh()
                live.update(render(state), refresh=True)
