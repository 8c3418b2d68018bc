"""The sinks of a run, listed in `SINKS`.

Logs are expendable: a sink that fails is named once on stderr, and training continues. It is given what follows, of
which TensorBoard writes nothing until the run resumes.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from megamoe.monitoring.console import ConsoleSink
from megamoe.monitoring.csv import CsvSink
from megamoe.monitoring.log_files import LogFilesSink
from megamoe.monitoring.sink import Sink
from megamoe.monitoring.tensorboard import TensorBoardSink
from megamoe.monitoring.wandb_api import TrackioSink, WandbSink

SINKS: tuple[type[Sink], ...] = (ConsoleSink, LogFilesSink)  # of every run
TRACKERS: dict[str, Callable[..., Sink]] = {
    "tensorboard": TensorBoardSink,
    "csv": CsvSink,
    "wandb": lambda **settings: BackgroundSink(WandbSink(**settings)),
    "trackio": lambda **settings: BackgroundSink(TrackioSink(**settings)),
}
WAITING = 10_000  # calls that a sink in the background may be behind
CLOSE_SECONDS = 30  # for a sink in the background to finish


class SinkGroup(Sink):
    """Hands everything to several sinks; one that fails is named once, and never ends the run."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks
        self._failed: set[Sink] = set()

    def __getattribute__(self, name: str) -> Any:
        is_method = name in vars(Sink) and not name.startswith("_")
        return partial(self._call, name) if is_method else super().__getattribute__(name)

    def _call(self, method: str, *args: Any) -> None:
        for sink in self._sinks:
            try:
                getattr(sink, method)(*args)
            except Exception as error:  # of whatever library a sink is made of
                if sink not in self._failed:
                    name, why = type(sink).__name__, error or repr(error)
                    print(f"warning: {name} failed ({why}); training continues.", file=sys.stderr, flush=True)
                self._failed.add(sink)


class BackgroundSink(SinkGroup):
    """Hands everything to a sink in a thread of its own, which may wait for a server: training never does, and the end
    of a run for CLOSE_SECONDS at most."""

    def __init__(self, sink: Sink):
        super().__init__([sink])
        self._calls: queue.Queue[tuple[str, Any]] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _call(self, method: str, *args: Any) -> None:
        name = type(self._sinks[0]).__name__
        try:
            self._calls.put_nowait((method, args))
        except queue.Full:
            raise TimeoutError(f"{name} is {WAITING} calls behind, and loses what it is given now") from None
        if method == "close":
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                raise TimeoutError(f"{name} has not finished within {CLOSE_SECONDS} s")

    def _work(self) -> None:
        method = ""
        while method != "close":
            method, args = self._calls.get()
            super()._call(method, *args)


def make_sinks(trackers: Mapping[str, dict[str, Any]]) -> list[Sink]:
    """Those of a run, with the settings of those of `TRACKERS` that are chosen. On rank 0."""
    return [*(kind() for kind in SINKS), *(TRACKERS[name](**settings) for name, settings in trackers.items())]
