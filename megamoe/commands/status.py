"""What the run in a folder is doing, or where it ended: from its files alone, none of which is changed or locked."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from megamoe.checkpoint import folders
from megamoe.config.cli import Options, Positional
from megamoe.data.ledger import read_ledger
from megamoe.monitoring.log_files import read_log
from megamoe.utils.errors import UserError
from megamoe.utils.run_folder import holder_of, last_record
from megamoe.utils.text import duration


class Status(Options):
    run: Positional[Path] = Field(description="folder of a run")


def status(options: Status) -> None:
    for name, value in rows(options.run):
        print(f"{name:<10}  {value}")


def rows(folder: Path) -> Iterator[tuple[str, str]]:
    """What there is to say, by name. Raises UserError."""
    record = last_record(folder)
    if record is None or folders.age_of(folder):  # a Universal Checkpoint has the record of its run
        raise UserError(f"{folder} holds no run; give a run folder, which has a run.json.")
    log = read_log(folder) if (folder / "log.jsonl").is_file() else dict[str, list[Any]](train=[], valid=[])
    saved = folders.run_checkpoints(folder / "checkpoints", read_ledger(folder))
    newest = next(filter(folders.is_complete, saved), None)
    last, holder = record.get("last_step"), holder_of(folder)
    is_done = newest is not None and (folders.step_of(newest) or 0) >= (last or math.inf)

    ranks = record.get("world_size", 1)
    split = f"{ranks} rank{'s' * (ranks > 1)}, ep_size {record.get('ep_size', 1)}"
    yield "run", f"{folder}, begun or resumed {record.get('time')}"
    yield "model", f"{record.get('preset')}, {record.get('parameters', 0):,} parameters on {split}"
    yield "state", f"running: {holder}" if holder else "done" if is_done else "not running"
    yield from _progress(folder, log, last, is_running=holder is not None)
    yield "checkpoint", f"{newest}, complete, saved {_age(newest)} ago" if newest else "none yet"
    if is_done:
        yield "next", f"megamoe chat {shlex.quote(str(folder))}"
    elif not holder:
        yield "go on", _command(folder, record, resumes=newest is not None)


def _progress(folder: Path, log: dict[str, list[Any]], last: int | None, is_running: bool) -> Iterator[tuple[str, str]]:
    if not log["train"]:
        yield "step", f"none is logged yet{f', of {last:,}' if last else ''}"
        return
    now = log["train"][-1]
    left = f", {duration(now['seconds_left'])} left" if is_running else ""
    yield "step", f"{now['step']:,}{f' of {last:,}' if last else ''}{left}, logged {_age(folder / 'log.jsonl')} ago"
    held_out = next((row for row in reversed(log["valid"]) if "loss" in row), None)
    valid = f"; held out {held_out['loss']:.4f} after step {held_out['step']:,}" if held_out else ""
    yield "loss", f"{now['loss']:.4f}{valid}"
    yield "MaxVio", f"{now['max_vio']:.2f}, running {now['running_max_vio']:.2f}"
    yield "speed", f"{now['tokens_per_second']:,.0f} tokens/s"


def _age(path: Path) -> str:
    """Time since a file was written, or anything in a folder was added."""
    return duration(max(time.time() - path.stat().st_mtime, 0))


def _command(folder: Path, record: dict[str, Any], resumes: bool) -> str:
    """The command that continues the run on one host, from where it was started."""
    words = [word for word in record.get("command", [])[1:] if not word.startswith("--local_rank")]
    given = {word.split("=")[0] for word in words}
    words = ["megamoe", "train", "--ranks", str(record.get("world_size", 1)), *words]
    if "--run_dir" not in given:
        words += ["--run_dir", str(folder)]
    if not given & {"--resume", "--auto_resume"}:
        words.append("--resume" if resumes else "--auto_resume")  # which begins again
    return shlex.join(words)
