"""The manifest: size and SHA-256 of each file of a checkpoint in one of DeepSpeed's layouts.

megamoe saved in such a layout before it had its own form (`index.py`), and still writes Universal Checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from megamoe.checkpoint import folders
from megamoe.utils import disk
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json

READ_BYTES = 1 << 22


class FileRecord(TypedDict):
    """What a manifest says about one file."""

    bytes: int
    sha256: str


def file_record(path: Path) -> FileRecord:
    """What a manifest says about a file that has been written."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def seal(folder: Path, about: dict[str, Any], files: dict[str, FileRecord]) -> None:
    """Write the manifest of `files`, named relative to `folder`.

    Args:
        about: what it says besides the files.
    """
    text = json.dumps({**about, "files": dict(sorted(files.items()))}, indent=1)
    disk.write_file(folder / folders.MANIFEST, text.encode())
    disk.flush(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest; None where it has none, as when DeepSpeed alone has written it.

    Raises UserError if it is malformed, or of another step than the name of its folder.
    """
    path = checkpoint / folders.MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(record, dict) and isinstance(record.get("bytes"), int) and isinstance(record.get("sha256"), str)
        for record in files.values()
    ):
        raise UserError(f"{path} does not list its files with bytes and sha256; use an older checkpoint.")
    step = folders.step_of(checkpoint)
    if step is not None and step != manifest.get("step"):
        raise UserError(
            f"{path} is of step {manifest.get('step')}, but its folder is called {checkpoint.name}; use an older "
            "checkpoint."
        )
    return manifest


def file_problems(checkpoint: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    """What keeps the files of a manifest from being what was saved, found by reading all of their bytes.

    Args:
        part: look at this share only, of `parts`; the shares together cover every file.
    """
    largest_first = sorted(manifest["files"].items(), key=lambda item: -item[1]["bytes"])
    return [
        problem
        for name, record in largest_first[part::parts]
        if (problem := _file_problem(checkpoint / name, record)) is not None
    ]


def _file_problem(path: Path, record: FileRecord) -> str | None:
    try:
        return _difference(path, record)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); fix that, or use an older checkpoint."


def _difference(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path} is missing; bring it back, or use an older checkpoint."
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"{path} has {size:,} bytes, not the {record['bytes']:,} that were saved; use an older checkpoint."
    if file_sha256(path) != record["sha256"]:
        return f"{path} has not the SHA-256 with which it was saved: its bytes have changed; use an older checkpoint."
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(READ_BYTES))  # one for all: new memory for each costs as much as the hashing
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
