"""What the folder of a run says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megamoe.monitoring.log_files import read_events, read_log
from megamoe.utils.errors import UserError
from megamoe.utils.run_folder import last_record

Rows = list[dict[str, Any]]


class RecordedRun(NamedTuple):
    """A run that has trained."""

    name: str  # of its folder
    record: dict[str, Any]  # of its start or last resume; empty where there is none
    log: dict[str, Rows]  # as of `read_log`
    events: Rows

    @property
    def held_out(self) -> Rows:
        """The evaluations of its first held-out set."""
        return [row for row in self.log["valid"] if "loss" in row]


def read_run(run_dir: Path) -> RecordedRun:
    """The run in a folder. Raises UserError where it has not trained."""
    if not (run_dir / "log.jsonl").is_file():
        raise UserError(f"{run_dir} holds no log.jsonl; give the folder of a run.")
    log = read_log(run_dir)
    if not log["train"]:
        raise UserError(f"{run_dir}/log.jsonl holds no step yet; wait for the first one.")
    return RecordedRun(run_dir.resolve().name, last_record(run_dir) or {}, log, read_events(run_dir))


def further_sets(valid: Rows) -> list[str]:
    """Names of the held-out sets after the first, in their order."""
    return list(dict.fromkeys(key.removesuffix("_loss") for row in valid for key in row if key.endswith("_loss")))


def description(name: str) -> str:
    """Which values a set's name stands for, as the end of a phrase; "" is the first set."""
    is_averaged = name == "ema" or name.startswith("ema_")
    name = name[len("ema_") :] if is_averaged else name
    return (f" on {name}" if name else "") + (" with averaged weights" if is_averaged else "")


def task_values(valid: Rows) -> list[str]:
    """Names of the values of tasks."""
    sets = further_sets(valid)
    others = {"kind", "step", "loss", "tokens", "bits_per_byte"}
    others |= {f"{name}_{value}" for name in sets for value in ("loss", "bits_per_byte")}
    return list(dict.fromkeys(key for row in valid for key in row if key not in others))


def points(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of those rows that have one."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def results(valid: Rows) -> Iterator[str]:
    """The last evaluation of each held-out set, and of the tasks."""
    for name in ("", *further_sets(valid)):
        prefix = f"{name}_" if name else ""
        last = next((row for row in reversed(valid) if f"{prefix}loss" in row), None)
        if last:
            bits = f", {last[f'{prefix}bits_per_byte']:.4f} bits per byte" if f"{prefix}bits_per_byte" in last else ""
            loss = f"{last[f'{prefix}loss']:.4f} nats per token{bits}"
            yield f"validation{description(name)} at step {last['step']}: {loss}"
    for key in task_values(valid):
        steps, values = points(valid, key)
        yield f"{key} at step {steps[-1]}: {values[-1]:.4f}"
