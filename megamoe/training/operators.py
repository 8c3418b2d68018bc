"""The operator that DeepSpeed compiles for an optimizer, loaded so that a killed start keeps no later one waiting.

torch guards a compilation by a file, `lock`, which a killed process leaves behind, and waits for it without an end. So
here a process that compiles, or that loads what is compiled, holds a lock of the operating system, which ends with it,
also on a shared file system; whoever has it alone removes torch's.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils.cpp_extension import _get_build_directory

from megamoe.utils.errors import UserError


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
    compiled, lock = folder / f"{name}.so", folder / "lock"
    with holder:
        # Nobody enters `load` while torch's lock is there, so as not to wait inside for one who has died.
        kind = fcntl.LOCK_SH if compiled.exists() and not lock.exists() else fcntl.LOCK_EX
        try:
            _take_turn(holder.fileno(), kind, f"compiles or loads {name} in {folder}")
        except OSError as error:
            raise _unusable(holder.name, error) from None
        if kind == fcntl.LOCK_EX:
            lock.unlink(missing_ok=True)
        if not compiled.exists():
            check_compiler(name)
            print(f"compiling {name}, once on this host, in {folder}; this takes minutes", flush=True)
        load()


def _take_turn(file: int, kind: int, what: str) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        print(f"waiting for another process, which {what}", flush=True)
        fcntl.lockf(file, kind)


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
