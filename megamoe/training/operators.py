"""The operator that DeepSpeed compiles for an optimizer, loaded so that a killed start keeps no later one waiting.

torch guards a compilation by a file, `lock`, which a killed process leaves behind, and waits for it without an end.
So here a process that compiles holds a lock of the operating system, which ends with it, also on a shared file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils.cpp_extension import _get_build_directory

from megamoe.ds_config import operator_builder
from megamoe.errors import UserError

MOST_SECONDS = 15 * 60  # that one process compiles
QUIET_SECONDS = 3
REPEAT_SECONDS = 60
POLL_SECONDS = 0.2


def load_operator(ds: dict[str, Any]) -> None:
    """Load the operator that the engine of a DeepSpeed JSON will use, if it uses one; compile it if need be.

    Raises UserError where another process compiles it without an end.
    """
    name = operator_builder(ds)
    builder = get_accelerator().create_op_builder(name) if name else None
    if builder and not installed_ops.get(builder.name):
        load_in_turn(builder.name, Path(_get_build_directory(builder.name, False)), builder.load)


def load_in_turn(name: str, folder: Path, load: Callable[[], Any]) -> None:
    """Call `load`, which compiles the operator in this folder or loads what is compiled, when nobody else compiles it.

    Raises UserError after 15 minutes of one process that does.
    """
    folder = folder.resolve()
    wait = _Wait(f"compiles {name} in {folder}")
    with open(folder / "holder", "a+") as file:
        while (holder := _take_turn(file, folder)) is not None:
            wait.go_on(holder)
        if not (folder / f"{name}.so").exists():
            print(f"compiling {name}, once on this host, in {folder}; this takes minutes", flush=True)
        load()


class _Wait:
    """A wait for one process after another, which says whom it waits for and has a limit for each."""

    def __init__(self, what: str):
        self._what = what  # they do
        self._holder = ""
        self._since = self._say_at = 0.0

    def go_on(self, holder: str) -> None:
        now = time.monotonic()
        if holder != self._holder:
            self._holder, self._since, self._say_at = holder, now, now + QUIET_SECONDS
        if now - self._since > MOST_SECONDS:
            raise UserError(
                f"{holder} {self._what} for {MOST_SECONDS / 60:.0f} minutes already, which is the limit; end that "
                "process and start again."
            )
        if now > self._say_at:
            print(f"waiting for {holder}, which {self._what}", flush=True)
            self._say_at = now + REPEAT_SECONDS
        time.sleep(POLL_SECONDS)


def _take_turn(file: IO[str], folder: Path) -> str | None:
    """Take the right to compile, or to load beside others what is compiled; else return who compiles."""
    lock = folder / "lock"  # torch's
    if _locked(file, fcntl.LOCK_EX):
        other = _compiler_here(folder) if lock.exists() else None
        if other is None:
            lock.unlink(missing_ok=True)  # of a process that was killed
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return None
        holder = f"process {other} on this host"
    elif _locked(file, fcntl.LOCK_SH) and not lock.exists():
        return None
    else:
        file.seek(0)
        holder = file.read() or "another process"
    fcntl.lockf(file, fcntl.LOCK_UN)
    return holder


def _locked(file: IO[str], kind: int) -> bool:
    """Whether this process has got the lock, which ends with `file` or with the process."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise UserError(
            f"{file.name} cannot be locked ({error.strerror}); set TORCH_EXTENSIONS_DIR to a folder on a file system "
            "with locks, such as a local disk."
        ) from None
    return True


def _compiler_here(folder: Path) -> int | None:
    """A process of this host that compiles in the folder without our lock: it has torch's open, or is a compiler that
    has outlived its rank."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            opened = [file.path for file in process.open_files()]
            if process.pid != os.getpid() and (process.cwd() == str(folder) or str(folder / "lock") in opened):
                return process.pid
    return None
