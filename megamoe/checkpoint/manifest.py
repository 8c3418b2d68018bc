"""Atomic checkpoint folders: manifest, rename, `latest`, retention. Plain files, no tensors.

RUN/checkpoints/step_N.partial is being written; step_N is complete, and its manifest.json has the size and SHA-256 of
each of its files; `latest` names the newest. A crash at any instant leaves the older checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from megamoe.config import read_json
from megamoe.errors import UserError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
STEP_NAME = r"step_(0|[1-9]\d*)"
READ_BYTES = 1 << 22


class FileRecord(TypedDict):
    """What a manifest says about one file."""

    bytes: int
    sha256: str


class HashedFile:
    """A new file, written once from front to back and hashed on the way by a second thread."""

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._bytes = 0
        self.error: OSError | None = None  # torch.save replaces what `write` raises by an error of its own

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        hashed = self._hasher.submit(self._digest.update, view)
        written = 0
        try:
            while written < len(view):  # the kernel takes 2 GiB at most at a time
                written += self._file.write(view[written:])
        except OSError as error:
            self.error = error
            raise
        finally:
            hashed.result()  # `data` may change once this returns
        self._bytes += written
        return written

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> FileRecord:
        self._file.close()
        self._hasher.shutdown()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def write_hashed(path: Path, write: Callable[[HashedFile], Any]) -> FileRecord:
    """Have `write` fill a new file. It is not yet on the disk: see `flush`."""
    file = HashedFile(path)
    try:
        write(file)
    except RuntimeError as error:
        raise file.error or error from None
    finally:
        record = file.close()
    return record


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the entries of a folder. Many files are written first and flushed then, so
    that the disk works on all of them at once."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a small new file to the disk."""
    record = write_hashed(path, lambda file: file.write(data))
    flush(path)
    return record


def replace_file(path: Path, text: str) -> None:
    """Replace the content of `path` atomically."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    write_file(partial, text.encode())
    os.replace(partial, path)
    flush(path.parent)


# --- writing --------------------------------------------------------------------------------------------------------


def partial_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return checkpoint.with_name(checkpoint.name + PARTIAL)


def seal(folder: Path, about: dict[str, Any], files: dict[str, FileRecord]) -> None:
    """Write the manifest of `files`, named relative to `folder`.

    Args:
        about: what it says besides the files.
    """
    write_file(folder / MANIFEST, json.dumps({**about, "files": dict(sorted(files.items()))}, indent=1).encode())
    flush(folder)


def commit(checkpoint: Path, about: dict[str, Any], files: dict[str, FileRecord]) -> None:
    """Make `partial_of(checkpoint)`, all written and flushed, the newest checkpoint; arguments are those of `seal`."""
    partial = partial_of(checkpoint)
    seal(partial, about, files)
    if checkpoint.exists():  # of a step that the run, resumed from an older one, has reached again
        discard(checkpoint)
    os.replace(partial, checkpoint)
    flush(checkpoint.parent)
    replace_file(checkpoint.parent / "latest", checkpoint.name)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; if killed meanwhile, what is left does not have a checkpoint's name."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> None:
    """Remove what an interrupted save or removal has left in a folder of checkpoints."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def prune(newest: Path, keep_last: int, keep_every: int, ignored: Collection[int] = ()) -> None:
    """Of the checkpoints up to `newest`, remove all but the last `keep_last` (0: all stay) and those at multiples of
    `keep_every` steps. Steps that are `ignored` stay and are not counted."""
    steps = sorted(set(map(step_of, checkpoints(newest.parent))) - set(ignored))
    steps = [step for step in steps if step <= step_of(newest)]
    for step in steps[:-keep_last] if keep_last else []:
        if not keep_every or step % keep_every:
            discard(newest.with_name(f"step_{step}"))


# --- reading --------------------------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint in `folder`, in no order, complete or damaged."""
    return [path for path in folder.glob("step_*") if re.fullmatch(STEP_NAME, path.name) and path.is_dir()]


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in `folder` in the order in which to try them: that of `latest`, then older ones, newest first.

    Those above `latest` come last: a run that resumed from an older one has left them behind.
    """
    latest = folder / "latest"
    name = latest.read_text().strip() if latest.is_file() else ""
    newest = int(name.removeprefix("step_")) if re.fullmatch(STEP_NAME, name) else None

    def order(checkpoint: Path) -> tuple[bool, int]:
        step = step_of(checkpoint)
        return newest is not None and step > newest, -step

    found = sorted(checkpoints(folder), key=order)
    lost = [folder / name] if newest is not None and folder / name not in found else []
    return lost + found


def found_at(path: Path) -> list[Path]:
    """What there is to try at `path`, in order: a run's checkpoints, those of a folder of them, or `path` itself."""
    return candidates(path / "checkpoints") or candidates(path) or [path]


def passed_over(checkpoint: Path, found: list[str]) -> str:
    """The line that says why a newer checkpoint, with the problems `found`, is not used."""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"passed over {checkpoint}: {found[0]}{more}"


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest; None where it has none, as when DeepSpeed alone has written it. Raises UserError."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(record, dict) and isinstance(record.get("bytes"), int) and isinstance(record.get("sha256"), str)
        for record in files.values()
    ):
        raise UserError(f"{path} does not list its files with bytes and sha256; use an older checkpoint.")
    return manifest


def problems(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What keeps a checkpoint from being what was saved, one sentence each, found by reading all of its bytes.

    Args:
        part: look at this share only, of `parts`; the shares together cover every file.
    """
    if not checkpoint.exists():
        return [f"{checkpoint} does not exist; check the path, or use an older checkpoint."]
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return error.problems
    if manifest is None:
        if (checkpoint / "run.json").is_file():  # then megamoe wrote it, and a manifest with it
            return [f"{checkpoint / MANIFEST} is missing; bring it back, or use an older checkpoint."]
        return []
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
    if sha256(path) != record["sha256"]:
        return f"{path} has not the SHA-256 with which it was saved: its bytes have changed; use an older checkpoint."
    return None


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(READ_BYTES))  # one for all: new memory for each costs as much as the hashing
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
