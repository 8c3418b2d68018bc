"""A run's values as tables, for pandas and spreadsheets."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from megamoe.monitoring.log_files import read_log
from megamoe.monitoring.names import named
from megamoe.monitoring.sink import Sink
from megamoe.utils import disk


class CsvSink(Sink):
    """FOLDER/train.csv and valid.csv: a row per step, a column per value. They are made from log.jsonl, without what is
    superseded, where a run starts, goes back or has a new value, and appended to in between."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._columns: dict[str, list[str]] = {"train": [], "valid": []}

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        self._run_dir = run_dir
        self.go_back(first_step)

    def go_back(self, step: int) -> None:
        for kind in self._columns:
            self._write(kind, step)

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        row = {"step": step, **named(kind, values)}
        if row.keys() <= {*self._columns[kind]}:
            with open(self._folder / f"{kind}.csv", "a", newline="") as file:
                csv.DictWriter(file, self._columns[kind]).writerow(row)
        else:
            self._write(kind, step)

    def _write(self, kind: str, last: int) -> None:
        log = read_log(self._run_dir)[kind] if (self._run_dir / "log.jsonl").exists() else []
        rows = [{"step": step, **named(kind, row)} for row in log if (step := row.pop("step")) <= last]
        self._columns[kind] = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns[kind])
        writer.writeheader()
        writer.writerows(rows)
        self._folder.mkdir(parents=True, exist_ok=True)
        disk.replace_file(self._folder / f"{kind}.csv", text.getvalue())
