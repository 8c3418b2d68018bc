"""Files that a crash leaves complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

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
