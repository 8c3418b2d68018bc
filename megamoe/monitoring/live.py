"""The live view of a run, drawn by the process that has started its ranks: what they print scrolls above it."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from megamoe.monitoring.run_state import RunState, since
from megamoe.monitoring.view import render
from megamoe.utils.errors import UserError

REFRESH_SECONDS, READ_SECONDS = 0.25, 1.0
LAST_SECONDS = 1.0  # for what still writes to the pipe after the ranks have ended


def is_wanted() -> bool:
    return sys.stdout.isatty() and Console().is_interactive


@contextlib.contextmanager
def shown(run_dir: Path) -> Iterator[int]:
    """Show the run until the end of the block; gives the descriptor that its ranks are to write to."""
    reading, writing = os.pipe()
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # of any length: no rank waits for the terminal
    view = LiveView(run_dir, lines)
    drawing = threading.Thread(target=view.draw)
    drain = threading.Thread(target=_drain, args=(reading, lines), daemon=True)
    drain.start()
    drawing.start()
    try:
        yield writing
    finally:
        os.close(writing)
        drain.join(LAST_SECONDS)
        lines.put(None)
        drawing.join()


def _drain(reading: int, lines: queue.SimpleQueue[str | None]) -> None:
    with open(reading, errors="replace") as file:
        for line in file:
            lines.put(line.rstrip("\n"))


class LiveView:
    """Draws until the queue gives None."""

    def __init__(self, run_dir: Path, lines: queue.SimpleQueue[str | None]):
        self._run_dir, self._lines = run_dir, lines
        self._state: RunState | None = None
        self._began, self._last_read, self._last_line = time.time(), 0.0, "the ranks load PyTorch and DeepSpeed"
        self._spinner = Spinner("dots")

    def draw(self) -> None:
        try:
            self._draw()
        except Exception as error:  # of what only shows the run
            print(f"warning: the live view failed ({error!r}); training continues", flush=True)
            while (line := self._lines.get()) is not None:
                print(line, flush=True)

    def _draw(self) -> None:
        with Live(console=Console(), auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
            ends = False
            while not ends:
                with contextlib.suppress(queue.Empty):
                    line = self._lines.get(timeout=REFRESH_SECONDS)
                    while line is not None:
                        self._take(line, live.console)
                        line = self._lines.get_nowait()
                    ends = True
                live.update(self._render(ends), refresh=True)

    def _take(self, line: str, console: Console) -> None:
        self._last_line = line
        if not line.startswith("step="):  # the view has that
            console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _render(self, ends: bool) -> RenderableType:
        if ends or time.monotonic() - self._last_read >= READ_SECONDS:
            self._read()
            self._last_read = time.monotonic()
        state = self._state
        if state and state.log["train"] and state.events and state.events[-1]["time"] > self._began:
            return render(state, None if ends else f"running for {since(self._began)}; Ctrl-C saves and ends")
        if ends:
            return Text("")
        self._spinner.update(text=Text(f"{since(self._began)}  {self._last_line}", no_wrap=True, overflow="ellipsis"))
        return Group("", self._spinner)

    def _read(self) -> None:
        with contextlib.suppress(UserError, OSError):  # it has not begun, or a file server is away for a moment
            if self._state:
                self._state.refresh()
            else:
                self._state = RunState(self._run_dir)
