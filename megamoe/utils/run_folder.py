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
import struct
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from megamoe.utils import disk
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import parse_json, read_json

LOCK, START, RESUMES = "lock", "run.json", "resumes.jsonl"
# The tokenizer, and what published models have next to it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
BEGUN = {LOCK, *TOKENIZER_FILES, START + disk.PARTIAL}  # all that a start leaves that was cut off
LEASE_SECONDS = 100  # after which a file server gives up the locks of a host that it does not hear of any more
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
MISSES, MISS_SECONDS = 3, 1.0  # a folder that a file server moves or mounts again is absent for a moment


class RunFolder:
    """The folder of one run, which may not exist yet."""

    def __init__(self, path: Path, waits: bool = False, locks: bool = True):
        """Lock the folder of a run; the lock ends with the process, whatever ends that, and with this object.

        Raises UserError where another process trains in it.

        Args:
            waits: for a process that may be about to exit, or a host that a file server may have lost.
            locks: False for one that only reads.
        """
        self.path = path
        self._waits = waits
        self._lock: IO[str] | None = None
        if locks and (path / START).is_file():
            self._take_lock()
        self.began = beginning(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    def is_foreign(self) -> bool:
        """Whether there is something else at this path."""
        if self.began is not None or not self.path.exists():
            return False
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else {""}
        return not names <= (BEGUN if LOCK in names else set())

    def enter(self, record: dict[str, Any], tokenizer_files: Iterable[Path]) -> None:
        """Write the record of a start or a resume, in a folder that stays locked; a start copies the files. Raises
        UserError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made ({error.strerror}); choose another --run_dir.") from None
        self._take_lock()
        if self.began is None and (self.path / START).is_file():
            raise UserError(f"{self.path} has become another run's meanwhile; choose another --run_dir.")
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}
        if self.began is not None:
            with open(self.path / RESUMES, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(record) + "\n")  # a kill can have torn the line before
            return
        for path in tokenizer_files:
            shutil.copyfile(path, self.path / path.name)
        disk.replace_file(self.path / START, json.dumps(record, indent=2) + "\n")

    def is_gone(self) -> bool:
        """Whether it has been removed, and perhaps made again, since this process locked it."""
        for attempt in range(MISSES):
            if attempt:
                time.sleep(MISS_SECONDS)
            try:
                found = os.stat(self.path / LOCK if self._lock else self.path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                return False  # nobody knows now
            return self._lock is not None and not os.path.samestat(found, os.fstat(self._lock.fileno()))
        return True

    def _take_lock(self) -> None:
        self._lock = self._lock or _lock(self.path, self._waits)

    def run_id(self) -> str | None:
        """Of the run in it, or a new one."""
        return uuid.uuid4().hex if self.began is None else self.began.get("run_id")


def beginning(folder: Path) -> dict[str, Any] | None:
    """How the run in a folder began; None where it holds none. Raises UserError."""
    path = folder / START
    return _checked(read_json(path), path) if path.is_file() else None


def last_record(folder: Path) -> dict[str, Any] | None:
    """How the run in a folder was last resumed, or began; None where it holds none. Raises UserError."""
    path = folder / RESUMES
    content = path.read_bytes() if path.is_file() else b""
    lines = [line for line in content.splitlines() if line]
    if not content.endswith(b"\n"):
        lines = lines[:-1]  # torn when the run was killed
    return _checked(parse_json(lines[-1], path), path) if lines else beginning(folder)


def holder_of(folder: Path) -> str | None:
    """Which process trains in a folder, as it says itself; None where nobody does. Takes no lock, at which a run that
    starts now would be refused."""
    try:
        with open(folder / LOCK, encoding="utf-8") as file:
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
            (kind,) = struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return None if kind == fcntl.F_UNLCK else file.read().strip() or "another process"
    except OSError:  # there is none, or the file system knows no locks
        return None


def _checked(record: dict[str, Any], path: Path) -> dict[str, Any]:
    kinds: dict[str, Any] = dict.fromkeys(("model", "run", "deepspeed", "versions"), dict)
    kinds |= dict.fromkeys(("data", "command"), list) | dict.fromkeys(("parameters", "world_size"), int)
    for key, kind in {**kinds, "last_step": int | None}.items():
        if key in record and not isinstance(record[key], kind):
            raise UserError(
                f"{path}: {key} is {shown(record[key])}, which no run has written; bring the file back, or choose "
                "another --run_dir."
            )
    return record


def _lock(folder: Path, waits: bool) -> IO[str] | None:
    """The locked file; None where the file system knows no locks, which is said. Raises UserError with the holder where
    there is one."""
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
        holder = file.read().strip() or "another run"
        if not waits or time.monotonic() > deadline:
            raise UserError(f"{folder} is in use by {holder}; wait for its end, or choose another --run_dir.")
        if not said:
            print(f"waiting up to {LEASE_SECONDS} s for {folder}, in use by {holder}", file=sys.stderr, flush=True)
            said = True
        time.sleep(1)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
    file.flush()
    return file
