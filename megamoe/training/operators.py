"""The operator that DeepSpeed compiles for an optimizer, loaded so that a killed start keeps no later one waiting.

torch guards a compilation by a file, `lock`, which a killed process leaves behind, and waits for it without an end. So
here a process that compiles, or that loads what is compiled, holds a lock of the operating system, which ends with it,
also on a shared file system; whoever has it alone removes torch's, if one of us left it or after 15 minutes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils.cpp_extension import _get_build_directory

from megamoe.utils.compiler import compiler_problem
from megamoe.utils.errors import UserError

MOST_SECONDS = 15 * 60  # that anyone compiles
QUIET_SECONDS = 3
POLL_SECONDS = 0.2


def load_operator(name: str | None) -> None:
    """Load the operator of DeepSpeed's builder of that name, if there is one; compile it if need be.

    Raises UserError where it cannot be compiled here.
    """
    builder = get_accelerator().create_op_builder(name) if name else None
    if builder and not installed_ops.get(builder.name):
        load_in_turn(builder.name, builder.load)


def load_in_turn(name: str, load: Callable[[], Any]) -> None:
    """Call `load`, which compiles the operator alone, or loads what is compiled next to others.

    Raises UserError where it is not compiled yet and cannot be.
    """
    try:
        folder = Path(_get_build_directory(name, False))
        holder = open(folder / "holder", "a+")  # noqa: SIM115 (its close, below, ends the lock)
    except OSError as error:
        raise _unusable(error.filename, error) from None
    compiled = folder / f"{name}.so"
    with holder:
        try:
            _wait_for_turn(holder, compiled, folder / "lock")
        except OSError as error:
            raise _unusable(holder.name, error) from None
        if not compiled.exists():
            if problem := compiler_problem():
                raise UserError(f"DeepSpeed compiles {name} on this host, where {problem}")
            print(f"compiling {name}, once on this host, in {folder}; this takes minutes", flush=True)
        load()
        with contextlib.suppress(OSError):  # unless others of us are in `load`
            fcntl.lockf(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder.truncate(0)


def _wait_for_turn(holder: IO[str], compiled: Path, lock: Path) -> None:
    """Wait until `load` may be entered, and mark the file of our lock. Raises UserError after 15 minutes."""
    start, is_said = time.monotonic(), False
    what = f"another process, which compiles or loads {compiled.stem} in {lock.parent}"
    while not _has_turn(holder, compiled, lock):
        if not is_said and time.monotonic() > start + QUIET_SECONDS:
            print(f"waiting for {what}", flush=True)
            is_said = True
        if time.monotonic() > start + MOST_SECONDS:
            raise UserError(f"there is {what} for 15 minutes already; end it (fuser {holder.name}) and start again.")
        time.sleep(POLL_SECONDS)
    holder.write("entered\n")
    holder.flush()


def _has_turn(holder: IO[str], compiled: Path, lock: Path) -> bool:
    """Take our lock, shared to load and alone to compile, if that is possible now.

    Args:
        lock: torch's. Nobody enters `load` while it is there, so as not to wait inside for one who has died.
    """
    loads = compiled.exists() and not lock.exists()
    try:
        fcntl.lockf(holder, (fcntl.LOCK_SH if loads else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    if loads:
        return True
    with contextlib.suppress(FileNotFoundError):
        if not os.fstat(holder.fileno()).st_size and time.time() - lock.stat().st_mtime < MOST_SECONDS:
            fcntl.lockf(holder, fcntl.LOCK_UN)  # none of us has died in `load`: it is another program's
            return False
    lock.unlink(missing_ok=True)
    return True


def _unusable(path: str, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written and locked ({error.strerror}), where torch keeps what DeepSpeed compiles; set "
        "TORCH_EXTENSIONS_DIR to a folder that can, such as one on a local disk."
    )
