"""What the run in a folder is doing, or how it ended: from its files alone, none of which is changed or locked."""

from __future__ import annotations

import math
import shlex
import socket
import time
from pathlib import Path
from typing import Any

from megamoe.checkpoint import folders
from megamoe.data.ledger import read_ledger
from megamoe.monitoring.log_files import ENDS, EVENTS, JsonLines, Rows, RunLog, last_sign
from megamoe.utils.errors import UserError
from megamoe.utils.run_folder import LOCK, holder_of, last_record
from megamoe.utils.text import duration

ENDED = {"stop": "stopped", "error": "failed", "death": "died", "stall": "stalled"}  # by event


class RunState:
    """A run as its files were at the last `refresh`, which reads what is new in them."""

    def __init__(self, folder: Path):
        """Raises UserError where the folder holds no run."""
        self.folder, self.name = folder, folder.resolve().name
        self.events: Rows = []
        self._log, self._new_events = RunLog(folder), JsonLines(folder / EVENTS)
        self.refresh()

    def refresh(self) -> None:
        record = last_record(self.folder)
        if record is None or folders.age_of(self.folder):  # a Universal Checkpoint has the record of its run
            raise UserError(f"{self.folder} holds no run; give a run folder, which has a run.json.")
        self.record, self.last_step = record, record.get("last_step")
        self.log = self._log.read()
        self.events += self._new_events.new()
        saved = folders.run_checkpoints(self.folder / "checkpoints", read_ledger(self.folder))
        self.checkpoint = next(filter(folders.is_complete, saved), None)
        self.holder = holder_of(self.folder)
        step = folders.step_of(self.checkpoint) if self.checkpoint else None
        self.is_done = step is not None and step >= (self.last_step or math.inf)

    def state(self) -> str:
        """Whether it runs, or of what it died."""
        last: dict[str, Any] = self.events[-1] if self.events else {"event": None}  # killed as it began
        if self.holder or self.is_done:
            return f"running: {self.holder}" if self.holder else "done"
        if last["event"] in ENDED:
            return f"{ENDED[last['event']]} after step {last['step']:,}, {since(last['time'])} ago: {last['reason']}"
        if last["event"] in ENDS:
            return "not running"
        lock = self.folder / LOCK
        holder = lock.read_text().strip() if lock.is_file() else ""
        heard = f"last heard of {since(last_sign(self.folder))} ago"
        if holder and f" on {socket.gethostname()}," not in holder:
            return f"locked by {holder}, or killed: this host sees no locks of others; {heard}"
        return f"killed: no process holds it, and nothing says how it ended; {heard}"

    @property
    def held_out(self) -> Rows:
        """The evaluations of its first held-out set."""
        return [row for row in self.log["valid"] if "loss" in row]

    def command(self) -> list[str]:
        """Its words, as one host starts the run."""
        words = [word for word in self.record.get("command", [])[1:] if not word.startswith("--local_rank")]
        return ["megamoe", "train", "--ranks", str(self.record.get("world_size", 1)), *words]

    def next_command(self) -> tuple[str, str] | None:
        """What to do now: "next" or "go on", and the command, on one host and from where the run was started."""
        if self.holder:
            return None
        if self.is_done:
            return "next", f"megamoe chat {shlex.quote(str(self.folder))}"
        words = self.command()
        given = {word.split("=")[0] for word in words}
        if "--run_dir" not in given:
            words += ["--run_dir", str(self.folder)]
        if not given & {"--resume", "--auto_resume"}:
            words.append("--resume" if self.checkpoint else "--auto_resume")  # which begins again
        return "go on", shlex.join(words)


def age(path: Path) -> str:
    """Time since a file was written, or anything in a folder was added."""
    return since(path.stat().st_mtime if path.exists() else time.time())  # retention may just have removed it


def since(moment: float) -> str:
    """Time since a moment, in seconds since 1970."""
    return duration(max(time.time() - moment, 0))
