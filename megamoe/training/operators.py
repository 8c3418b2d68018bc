"""The operator that DeepSpeed compiles for an optimizer, loaded so that a killed start keeps no later one waiting.

torch guards a compilation by a file, `lock`, which a killed process leaves behind, and waits for it without an end.
So here a process that compiles, or that loads what is compiled, holds a lock of the operating system, which ends with
it, also on a shared file system. It tells whose torch's lock is. What one of us has left who died is removed at once.
That of another program is left alone while its owner can be seen, or until it is 15 minutes old.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils.cpp_extension import _get_build_directory

from megamoe.utils.errors import UserError

MOST_SECONDS = 15 * 60  # that one process compiles
QUIET_SECONDS = 3
POLL_SECONDS = 0.2


def load_operator(name: str | None) -> None:
    """Load the operator of DeepSpeed's builder of that name, if there is one; compile it if need be.

    Raises UserError where it cannot be compiled here, or another process compiles it without an end.
    """
    builder = get_accelerator().create_op_builder(name) if name else None
    if builder and not installed_ops.get(builder.name):
        folder = build_folder(builder.name)
        if not (folder / f"{builder.name}.so").exists():
            check_compiler(builder.name)
        load_in_turn(builder.name, folder, builder.load)


def build_folder(name: str) -> Path:
    """Where torch keeps an operator that it compiles. Raises UserError where that cannot be written."""
    try:
        folder = Path(_get_build_directory(name, False))
        (folder / "holder").touch()
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}), where torch keeps {name} when it is compiled; set "
            "TORCH_EXTENSIONS_DIR to a folder that can."
        ) from None
    return folder


def check_compiler(name: str) -> None:
    """Raises UserError where the host lacks what an operator is compiled with."""
    compiler = os.environ.get("CXX") or "c++"  # as torch takes it
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not shutil.which(shlex.split(compiler)[0]):
        lack = f"there is no C++ compiler {compiler}; install one (Debian, Ubuntu: apt install g++), or set CXX."
    elif not header.exists():
        lack = f"there is no {header}; install Python's headers (Debian, Ubuntu: apt install python3-dev)."
    else:
        return
    raise UserError(f"DeepSpeed compiles {name} on this host, where {lack}")


def load_in_turn(name: str, folder: Path, load: Callable[[], Any]) -> None:
    """Call `load`, which compiles the operator in this folder alone, or loads what is compiled beside others.

    Raises UserError after 15 minutes of one process that keeps it from that.
    """
    folder = folder.resolve()
    compiled = folder / f"{name}.so"
    with open(folder / "holder", "a+") as file:
        _wait_for_turn(file, folder / "lock", compiled, f"compiles or loads {name} in {folder}")
        if not compiled.exists():
            print(f"compiling {name}, once on this host, in {folder}; this takes minutes", flush=True)
        try:
            load()
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)
            if _locked(file, fcntl.LOCK_EX):  # the last of us: none is left that could die
                file.truncate(0)


def _wait_for_turn(file: IO[str], lock: Path, compiled: Path, what: str) -> None:
    """Take the turn, see `_take_turn`. Says who keeps it from us, and has a limit for each of them.

    Args:
        what: they do.
    """
    holder, since, is_said = "", time.monotonic(), False
    while (found := _take_turn(file, lock, compiled)) is not None:
        if found and found != holder:
            holder, since, is_said = found, time.monotonic(), False
        waited = time.monotonic() - since
        if waited > MOST_SECONDS:
            raise UserError(
                f"{holder or 'another process'} {what} for {MOST_SECONDS / 60:.0f} minutes already, which is the "
                "limit; end that process and start again."
            )
        if holder and waited > QUIET_SECONDS and not is_said:
            print(f"waiting for {holder}, which {what}", flush=True)
            is_said = True
        time.sleep(POLL_SECONDS)


def _take_turn(file: IO[str], lock: Path, compiled: Path) -> str | None:
    """Take the right to load beside others what is compiled, or to compile; else return who keeps it from us.

    Returns "" where that is not known.

    Args:
        file: has a line for each of us that is in `load` or has died there.
        lock: torch's. Nobody of us enters `load` while it is there, so as not to wait inside for one who has died.
    """
    loads = compiled.exists() and not lock.exists()
    if not _locked(file, fcntl.LOCK_SH if loads else fcntl.LOCK_EX):
        return _last_of_us(file)
    if not loads:  # so none of us is in `load`, on any host
        if lock.exists() and (holder := _foreign_holder(lock, is_ours=bool(_last_of_us(file)))):
            fcntl.lockf(file, fcntl.LOCK_UN)
            return holder
        lock.unlink(missing_ok=True)
        file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None


def _last_of_us(file: IO[str]) -> str:
    """Which of us was the last to enter `load`; "" if all have come out of it."""
    file.seek(0)
    return (file.read().splitlines() or [""])[-1]


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


def _foreign_holder(lock: Path, is_ours: bool) -> str | None:
    """Who has torch's lock while none of us is in `load`; None where it is left from one who has died.

    Args:
        is_ours: whether one of us has died in `load`, so that it is the one who left the lock.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # It has the lock open, or is a compiler that has outlived its rank.
            opened = [file.path for file in process.open_files()]
            if process.pid != os.getpid() and (process.cwd() == str(lock.parent) or str(lock) in opened):
                return f"process {process.pid} on this host"
    with contextlib.suppress(FileNotFoundError):
        if not is_ours and time.time() - lock.stat().st_mtime < MOST_SECONDS:
            return "a process that cannot be seen from here"
    return None
