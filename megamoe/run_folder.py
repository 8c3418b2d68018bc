"""A run's folder: who trains in it, how the run began, and what each resume changed.

RUN/run.json         the record of the start; never written again
RUN/resumes.jsonl    a record for each resume, appended
RUN/lock             locked while a run trains in the folder
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import IO, Any

from megamoe.errors import UserError, shown
from megamoe.json_files import read_json

LOCK = "lock"
LEASE_SECONDS = 100  # after which a file server gives up the locks of a host that it does not hear of any more
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunFolder:
    """The folder of one run, which may not exist yet."""

    def __init__(self, path: Path):
        self.path = path
        self.began: dict[str, Any] | None = None  # how the run began
        if self._start.is_file():
            self.began = _checked(read_json(self._start), self._start)

    @property
    def _start(self) -> Path:
        return self.path / "run.json"

    @property
    def _resumes(self) -> Path:
        return self.path / "resumes.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    def is_foreign(self) -> bool:
        """Whether there is something else at this path."""
        if self.began is not None or not self.path.exists():
            return False
        return not self.path.is_dir() or any(path.name != LOCK for path in self.path.iterdir())

    def last_record(self) -> dict[str, Any]:
        """The record of the last resume, or of the start."""
        if self._resumes.is_file():
            for line in reversed(self._resumes.read_bytes().splitlines()):
                try:
                    return _checked(json.loads(line), self._resumes)
                except (ValueError, RecursionError):
                    continue  # torn when the run was killed
        return self.began or {}

    def enter(self, record: dict[str, Any], tokenizer: Path | None) -> None:
        """Write the record of a start or a resume, in a folder that stays locked. On rank 0. Raises UserError."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = lock(self.path)
        if self.began is None and self._start.is_file():
            raise UserError(f"{self.path} has become another run's meanwhile; choose another --run_dir.")
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}
        if self.began is not None:
            with open(self._resumes, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(record) + "\n")  # a kill can have torn the line before
            return
        if tokenizer:
            shutil.copyfile(tokenizer, self.path / "tokenizer.json")
        partial = self.path / "run.json.partial"
        partial.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(partial, self._start)

    def run_id(self) -> str | None:
        """Of the run in it, or a new one; None for a run that began before runs had ids."""
        return uuid.uuid4().hex if self.began is None else self.began.get("run_id")


def _checked(record: dict[str, Any], path: Path) -> dict[str, Any]:
    for key, kind in (("model", dict), ("run", dict), ("deepspeed", dict), ("versions", dict), ("data", list)):
        if not isinstance(record, dict) or not isinstance(record.get(key, kind()), kind):
            raise UserError(
                f"{path}: {key} is {shown(record.get(key) if isinstance(record, dict) else record)}, which no run has "
                "written; bring the file back, or choose another --run_dir."
            )
    return record


def lock(folder: Path) -> IO[str] | None:
    """Lock an existing run folder; the lock ends with the process that holds it, whatever ends that, and with the file
    that is returned.

    None where the file system knows no locks, which is said. Raises UserError with the holder where there is one.
    """
    try:
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the lock
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --run_dir.") from None
    deadline, said = time.monotonic() + LEASE_SECONDS, False
    while True:
        try:
            # Not flock: those of a fork's parent and children are one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"{folder} is on a file system without locks; start one run in it at a time.", file=sys.stderr)
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        file.seek(0)
        holder = file.read().strip()
        if f" on {socket.gethostname()}," in holder or time.monotonic() > deadline:
            raise UserError(
                f"{folder} is in use by {holder or 'another run'}; wait for its end, or choose another --run_dir."
            )
        if not said:
            print(f"waiting up to {LEASE_SECONDS} s for {folder}, in use by {holder}", file=sys.stderr, flush=True)
            said = True
        time.sleep(1)
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file
