"""Files that a crash leaves complete or absent, and outputs that must not be there yet."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megamoe.utils.errors import UserError

PARTIAL = ".partial"


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a small new file to the disk."""
    with open(path, "xb") as file:
        file.write(data)
    flush(path)


def replace_file(path: Path, text: str) -> None:
    """Replace the content of `path` atomically."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    write_file(partial, text.encode())
    os.replace(partial, path)
    flush(path.parent)


def existing_folder(path: Path) -> Path:
    """The path itself where it is a folder, or the first above it that there is."""
    return next(parent for parent in [path, *path.absolute().parents] if parent.is_dir())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, as hexadecimal digits."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def check_absent(out: Path) -> None:
    """Raise UserError if there is something at `out`, or a file where its folder should be."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it, or choose another output.")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{out} cannot be made, for {parent} is a file; choose another output.")


@contextmanager
def output(out: Path) -> Iterator[Path]:
    """Where the caller makes what becomes `out`, a file or a folder, at the end. It is removed on an error, or by the
    next call where this one was killed. Raises UserError if there is something at `out`."""
    check_absent(out)
    folder = out.with_name(f".{out.name}{PARTIAL}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    partial = folder / out.name
    try:
        yield partial
        for path in [partial, *partial.rglob("*")]:
            flush(path)
        os.rename(partial, out)
    except OSError as error:
        check_absent(out)
        error.filename = error.filename or str(out)  # a write to a full disk does not say where
        raise
    except (SafetensorError, RuntimeError) as error:  # theirs and torch's form of an OSError
        if isinstance(error, (NotImplementedError, RecursionError)):
            raise
        raise UserError(f"{out} cannot be written ({error}); check that the disk has space.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
