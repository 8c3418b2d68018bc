"""The folders of a run's checkpoints: names, order, removal. Plain files, no tensors.

    RUN/checkpoints/step_2000      saved after step 2000
    RUN/checkpoints/step_1000.1    saved after the run went back, to a checkpoint before step 2000, for the first time

A checkpoint is complete once its index (form 2) or manifest (form 1, DeepSpeed's layouts) is there. The newest complete
one counts; `latest` names it for other programs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megamoe.run_folder import RunFolder

INDEX, MANIFEST = "index.json", "manifest.json"  # the last to be written, and the first to be removed
INDEX_END = b"}\n"  # of an index of which all has been written
PARTIAL = ".partial"
NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})(?:\.([1-9][0-9]{0,8}))?")


class Age(NamedTuple):
    """The order in which a run writes its checkpoints."""

    generation: int  # how often the run had gone back to an older checkpoint
    step: int


def age_of(checkpoint: Path) -> Age | None:
    """By the name of the folder; None where it is no checkpoint's."""
    found = NAME.fullmatch(checkpoint.name)
    return Age(int(found[2] or 0), int(found[1])) if found else None


def step_of(checkpoint: Path) -> int | None:
    """The optimizer step after which it was saved, by its name; None where it has another name."""
    age = age_of(checkpoint)
    return age.step if age else None


def name_of(age: Age) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{age.step}.{age.generation}" if age.generation else f"step_{age.step}"


# --- finding --------------------------------------------------------------------------------------------------------


def step_folders(folder: Path) -> list[Path]:
    """Every folder with a checkpoint's name in `folder`, complete or not, the newest first."""
    found = [(age, path) for path in folder.glob("step_*") if (age := age_of(path)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def is_complete(checkpoint: Path) -> bool:
    """Whether all of it has been written."""
    return has_index(checkpoint) or (checkpoint / MANIFEST).is_file()


def has_index(checkpoint: Path) -> bool:
    """Whether it is complete in megamoe's own form: a kill can leave an index that ends early, which is none."""
    try:
        with open(checkpoint / INDEX, "rb") as file:
            file.seek(-len(INDEX_END), os.SEEK_END)
            return file.read() == INDEX_END
    except OSError:  # absent, or shorter than that
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the newest first. Their bytes are not looked at."""
    return [path for path in step_folders(folder) if is_complete(path)]


def found_at(path: Path) -> list[Path]:
    """What there is to try at `path`, in order: a run's checkpoints, those of a folder of them, or `path` itself."""
    return step_folders(path / "checkpoints") or step_folders(path) or [path]


def run_of(checkpoint: Path) -> dict[str, Any] | None:
    """How the run began in whose folder a checkpoint lies; None where it lies in none. Raises UserError."""
    return RunFolder(checkpoint.absolute().parent.parent).began


def passed_over(checkpoint: Path, problems: list[str]) -> str:
    """The line that says why a newer checkpoint, with these problems, is not used."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"passed over {checkpoint}: {problems[0]}{more}"


# --- writing and removing -------------------------------------------------------------------------------------------


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


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, of a link the link alone; if killed meanwhile, what is left is not complete."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    for name in (INDEX, MANIFEST):
        (checkpoint / name).unlink(missing_ok=True)
    flush(checkpoint)
    shutil.rmtree(checkpoint)


def clean(folder: Path) -> None:
    """Remove what an interrupted save or removal has left in a folder of checkpoints."""
    for path in [*folder.glob(f"*{PARTIAL}"), *filter(_is_leftover, step_folders(folder))]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_leftover(checkpoint: Path) -> bool:
    """Whether it has only files of an interrupted save or removal: not, say, a checkpoint that DeepSpeed wrote."""
    ours = re.compile(r"rank_\d+\.safetensors|zero_to_fp32\.py|index\.json")
    return not is_complete(checkpoint) and all(ours.fullmatch(path.name) for path in checkpoint.iterdir())


def prune(folder: Path, keep_last: int, keep_every: int, is_good: Callable[[Path], bool]) -> None:
    """Remove all but the `keep_last` (at least 1) newest checkpoints, those at multiples of `keep_every` steps, and the
    newest that `is_good`."""
    found = checkpoints(folder)
    kept, rest = found[:keep_last], found[keep_last:]
    if rest and not any(map(is_good, kept)):
        good = next(filter(is_good, rest), None)
        rest = [path for path in rest if path != good]
    for path in rest:
        step = step_of(path)
        if not keep_every or step is None or step % keep_every:
            discard(path)
