"""The sinks of a run, listed in `SINKS`.

Logs are expendable: a sink that fails is named once on stderr, and training continues. It is given what follows, of
which TensorBoard writes nothing until the run resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.monitoring.console import ConsoleSink
from megamoe.monitoring.log_files import LogFilesSink
from megamoe.monitoring.sink import Sample, Sink
from megamoe.monitoring.tensorboard import TensorBoardSink

if TYPE_CHECKING:
    from torch import Tensor

SINKS: tuple[type[Sink], ...] = (ConsoleSink, LogFilesSink, TensorBoardSink)


class SinkGroup(Sink):
    """Hands everything to several sinks; one that fails is named once, and never ends the run."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks
        self._failed: set[Sink] = set()

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        self._call_each("open", run_dir, first_step, record)

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._call_each("log_scalars", kind, step, values)

    def log_text(self, step: int, text: str) -> None:
        self._call_each("log_text", step, text)

    def log_expert_loads(self, step: int, blocks: list[int], counts: Tensor) -> None:
        self._call_each("log_expert_loads", step, blocks, counts)

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        self._call_each("log_samples", step, samples)

    def log_event(self, event: str, step: int, values: dict[str, Any]) -> None:
        self._call_each("log_event", event, step, values)

    def go_back(self, step: int) -> None:
        self._call_each("go_back", step)

    def close(self) -> None:
        self._call_each("close")

    def _call_each(self, method: str, *args: Any) -> None:
        for sink in self._sinks:
            try:
                getattr(sink, method)(*args)
            except Exception as error:  # of whatever library a sink is made of
                if sink not in self._failed:
                    name, why = type(sink).__name__, error or repr(error)
                    print(f"warning: {name} failed ({why}); training continues.", file=sys.stderr, flush=True)
                self._failed.add(sink)


def open_sinks(run_dir: Path, first_step: int, record: dict[str, Any], *more: Sink) -> SinkGroup:
    """All sinks of a run and `more`, open. On rank 0.

    Args:
        record: of the run, as in run.json.
    """
    group = SinkGroup([*(kind() for kind in SINKS), *more])
    group.open(run_dir, first_step, record)
    return group
