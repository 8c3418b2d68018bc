"""The operator that DeepSpeed compiles for an optimizer, loaded so that a killed start keeps no later one waiting.

torch guards a compilation by a file, `lock`, which a killed process leaves behind, and waits for it without an end. So
here a process that compiles, or that loads what is compiled, holds a lock of the operating system, which ends with it,
also on a shared file system. What one of us has left who died is removed at once; a lock of another program when it is
15 minutes old.
"""

from __future__ import annotations

import contextlib
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
        folder = Path(_get_build_directory(name, False)).resolve()
        (folder / "holder").touch()
    except OSError as error:
        raise _unusable(error.filename, error) from None
    return folder


def _unusable(path: str, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written and locked ({error.strerror}), where torch keeps what DeepSpeed compiles; set "
        "TORCH_EXTENSIONS_DIR to a folder that can, such as one on a local disk."
    )


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
    """Call `load`, which compiles the operator in this folder alone, or loads what is compiled next to others.

    Raises UserError after 15 minutes of others that keep it from that.
    """
    compiled = folder / f"{name}.so"
    with open(folder / "holder", "a+") as file:  # a line for each of us that is in `load`, or has died there
        _wait_for_turn(file, compiled, f"compiles or loads {name} in {folder}")
        if not compiled.exists():
            print(f"compiling {name}, once on this host, in {folder}; this takes minutes", flush=True)
        try:
            load()
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)
            if _locked(file, fcntl.LOCK_EX):  # the last of us: none is left that could die
                file.truncate(0)


def _wait_for_turn(file: IO[str], compiled: Path, what: str) -> None:
    """Take the turn, see `_take_turn`, within MOST_SECONDS. Says who keeps it from us.

    Args:
        what: they do.
    """
    since, said = time.monotonic(), ""
    while holder := _take_turn(file, compiled):
        waited = time.monotonic() - since
        if waited > MOST_SECONDS:
            raise UserError(
                f"{holder} {what}, for which this process has waited {MOST_SECONDS / 60:.0f} minutes, the limit; end "
                "that process and start again."
            )
        if waited > QUIET_SECONDS and holder != said:
            print(f"waiting for {holder}, which {what}", flush=True)
            said = holder
        time.sleep(POLL_SECONDS)


def _take_turn(file: IO[str], compiled: Path) -> str | None:
    """Take the right to load next to others what is compiled, or to compile; else return who keeps it from us.

    Nobody of us enters `load` while torch's lock is there, so as not to wait inside for one who has died.
    """
    lock = compiled.with_name("lock")
    loads = compiled.exists() and not lock.exists()
    if not _locked(file, fcntl.LOCK_SH if loads else fcntl.LOCK_EX):
        return _last_of_us(file) or "another process"
    if not loads:  # so none of us is in `load`, on any host
        with contextlib.suppress(FileNotFoundError):
            if not _last_of_us(file) and time.time() - lock.stat().st_mtime < MOST_SECONDS:
                return "another program"
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
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise _unusable(file.name, error) from None
    return True
