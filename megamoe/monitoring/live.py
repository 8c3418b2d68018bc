"""The live view of a run, drawn by the process that has started its ranks: what they print scrolls above it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from megamoe.monitoring.run_state import RunState, since
from megamoe.monitoring.view import render
from megamoe.utils.errors import UserError

DRAW_SECONDS, READ_SECONDS = 0.25, 1.0
LAST_SECONDS = 1.0  # for what still writes to the pipe after the ranks have ended


def is_wanted() -> bool:
    """Whether the output is a terminal that can show it."""
    return sys.stdout.isatty() and Console().is_interactive


@contextlib.contextmanager
def shown(run_dir: Path) -> Iterator[int]:
    """Show the run until the end of the block; gives the descriptor that its ranks are to write to."""
    reading, writing = os.pipe()
    lines = SimpleQueue[str | None]()  # of any length: no rank waits for the terminal

    def drain() -> None:
        with open(reading, errors="replace") as file:
            for line in file:
                lines.put(line.rstrip("\n"))

    drains = threading.Thread(target=drain, daemon=True)
    draws = threading.Thread(target=LiveView(run_dir, lines).draw)
    drains.start()
    draws.start()
    try:
        yield writing
    finally:
        os.close(writing)
        drains.join(LAST_SECONDS)
        lines.put(None)
        draws.join()


class LiveView:
    """Draws a run and the lines of its ranks until the queue gives None."""

    def __init__(self, run_dir: Path, lines: SimpleQueue[str | None]):
        self._run_dir, self._lines = run_dir, lines
        self._state: RunState | None = None
        self._began, self._read_at = time.time(), 0.0
        self._spinner = Spinner("dots")
        self._last_line = "the ranks load PyTorch and DeepSpeed"

    def draw(self) -> None:
        try:
            with Live(console=Console(), auto_refresh=False) as live:
                while self._take_lines(live.console):
                    live.update(self._picture(f"running for {since(self._began)}; Ctrl-C saves and ends"), refresh=True)
                self._read_at = 0.0
                live.update(self._picture(None), refresh=True)
        except Exception as error:  # of what only shows the run
            print(f"warning: the live view failed ({error!r}); training continues", flush=True)
            while (line := self._lines.get()) is not None:
                print(line, flush=True)

    def _take_lines(self, console: Console) -> bool:
        """Print what has come within DRAW_SECONDS; returns whether more may come."""
        with contextlib.suppress(Empty):
            line = self._lines.get(timeout=DRAW_SECONDS)
            while line is not None:
                if not line.startswith("step="):  # the view has that
                    self._last_line = line
                    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
                line = self._lines.get_nowait()
            self._lines.put(None)  # also the end of those that are printed where the last picture fails
            return False
        return True

    def _picture(self, activity: str | None) -> RenderableType:
        if time.monotonic() - self._read_at >= READ_SECONDS:
            with contextlib.suppress(UserError, OSError):  # it has not begun, or a file server is away for a moment
                self._state = self._state or RunState(self._run_dir)
                self._state.refresh()
            self._read_at = time.monotonic()
        state = self._state
        if state and state.log["train"] and state.events and state.events[-1]["time"] > self._began:
            return render(state, activity)
        self._spinner.update(text=Text(f"{since(self._began)}  {self._last_line}", no_wrap=True, overflow="ellipsis"))
        return self._spinner if activity else ""
