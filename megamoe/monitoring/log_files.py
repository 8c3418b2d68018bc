"""A run's values and events as JSON lines, and how they are read back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamoe.monitoring.sink import Sample, Sink
from megamoe.utils.run_folder import START

Rows = list[dict[str, Any]]
EVENTS = "events.jsonl"
ENDS = ("stop", "end", "error", "death", "stall")  # the events after which nobody trains, until a resume


class LogFilesSink(Sink):
    """RUN/log.jsonl, every number unrounded, and RUN/events.jsonl, appended only: a record per line. `read_log` and
    `read_events` read them back."""

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        self._run_dir = run_dir

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        _append(self._run_dir / "log.jsonl", {"kind": kind, "step": step, **values})

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        texts = [sample._asdict() for sample in samples]
        _append(self._run_dir / "log.jsonl", {"kind": "samples", "step": step, "samples": texts})

    def log_event(self, event: str, step: int, values: dict[str, Any]) -> None:
        write_event(self._run_dir, event, step, values)


def write_event(run_dir: Path, event: str, step: int, values: dict[str, Any]) -> None:
    """Append to RUN/events.jsonl, from any rank. `values` may have another `time` than now."""
    _append(run_dir / EVENTS, {"time": time.time(), "event": event, "step": step, **values})


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """With None for NaN and infinity, which a skipped step brings and JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()}  # fmt: skip


def _append(path: Path, values: dict[str, Any]) -> None:
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")  # a run that was killed while it wrote has left half a line
        file.write(json.dumps(finite(values)).encode() + b"\n")


class JsonLines:
    """A file of JSON lines that may still grow."""

    def __init__(self, path: Path):
        self._path, self._end = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The records since the last call; none where there is no file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(self._path, "rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                with contextlib.suppress(ValueError):  # torn when the run was killed
                    yield json.loads(line)


class RunLog:
    """RUN/log.jsonl, which may still grow."""

    def __init__(self, run_dir: Path):
        self._lines, self._newest = JsonLines(run_dir / "log.jsonl"), 0
        self._records: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "valid": {}, "samples": {}}

    def read(self) -> dict[str, Rows]:
        """The records up to now, as `read_log`."""
        for record in self._lines.new():
            kind, step = record.pop("kind"), record["step"]
            if kind == "train" and step < self._newest:  # steps only rise, until a resume goes back
                for by_step in self._records.values():
                    for later in [logged for logged in by_step if logged > step]:
                        del by_step[later]
            self._newest = step if kind == "train" else max(self._newest, step)
            self._records[kind][step] = {key: math.nan if value is None else value for key, value in record.items()}
        return {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in self._records.items()}


def read_log(run_dir: Path) -> dict[str, Rows]:
    """The records of RUN/log.jsonl by kind ("train", "valid", "samples") and step, without those that a resumed run
    left behind."""
    return RunLog(run_dir).read()


def last_sign(run_dir: Path) -> float:
    """When a run has last written a record, in seconds since 1970."""
    files = (run_dir / name for name in (START, EVENTS, "log.jsonl"))
    return max(file.stat().st_mtime for file in files if file.is_file())


def read_events(run_dir: Path) -> Rows:
    """The records of RUN/events.jsonl as they were written; none where there is no file."""
    return list(JsonLines(run_dir / EVENTS).new())
