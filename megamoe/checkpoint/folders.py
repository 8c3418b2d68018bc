"""The folders of a run's checkpoints: names, order, removal. Plain files, no tensors.

    RUN/checkpoints/step_2000      saved after step 2000
    RUN/checkpoints/step_1000.1    saved after the run went back, to a checkpoint before step 2000, for the first time

A checkpoint is complete once its index, or the manifest of a Universal Checkpoint, is there. The newest complete one
counts; `latest` names it for other programs.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from megamoe.data.ledger import DataLedger, read_ledger
from megamoe.utils.disk import PARTIAL, flush
from megamoe.utils.run_folder import beginning

INDEX, MANIFEST = "index.json", "manifest.json"  # the last to be written, and the first to be removed
INDEX_END = b"}\n"  # of an index of which all has been written
SCRIPT = "zero_to_fp32.py"
FILE = re.compile(r"rank_[0-9]{5,}\.safetensors|zero_to_fp32\.py")  # of megamoe's own form, but for the index
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


def rank_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


def name_of(age: Age) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{age.step}.{age.generation}" if age.generation else f"step_{age.step}"


# --- finding --------------------------------------------------------------------------------------------------------


def step_folders(folder: Path) -> list[Path]:
    """Every folder with a checkpoint's name in `folder`, complete or not, the newest first. Raises OSError where it
    cannot be listed: that is not to be taken for an empty one."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(age, folder / one.name) for one in entries if (age := age_of(folder / one.name)) and one.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def is_complete(checkpoint: Path) -> bool:
    """Whether all of it has been written."""
    return has_index(checkpoint) or (checkpoint / MANIFEST).is_file()


def has_index(checkpoint: Path) -> bool:
    """Whether it is complete in megamoe's own form: a kill can leave an index that ends early, which is none. Raises
    OSError where that cannot be read."""
    try:
        with open(checkpoint / INDEX, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - len(INDEX_END), 0))
            return file.read() == INDEX_END
    except (FileNotFoundError, NotADirectoryError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the newest first. Their bytes are not looked at."""
    return [path for path in step_folders(folder) if is_complete(path)]


def run_checkpoints(folder: Path, ledger: DataLedger) -> list[Path]:
    """As `step_folders`, without those that the run has gone back from for good."""
    found = [(age_of(path), path) for path in step_folders(folder)]
    return [path for age, path in found if age and not ledger.has_left(age.step, age.generation)]


def found_at(path: Path) -> list[Path]:
    """What there is to try at `path`, in order: a run's checkpoints, those of a folder of them, or `path` itself.
    Raises UserError."""
    of_run = run_checkpoints(path / "checkpoints", read_ledger(path)) if path.is_dir() else []
    return of_run or step_folders(path) or [path]


def run_of(checkpoint: Path) -> dict[str, Any] | None:
    """How the run began in whose folder a checkpoint lies; None where it lies in none. Raises UserError."""
    return beginning(checkpoint.absolute().parent.parent)


def passed_over(checkpoint: Path, problems: list[str]) -> str:
    """The line that says why a newer checkpoint, with these problems, is not used."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"passed over {checkpoint}: {problems[0]}{more}"


# --- writing and removing -------------------------------------------------------------------------------------------


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
    """Remove what an interrupted save or removal has left in a folder of checkpoints. Raises OSError."""
    for path in [*folder.glob(f"*{PARTIAL}"), *filter(_is_leftover, step_folders(folder))]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_leftover(checkpoint: Path) -> bool:
    """Whether it has only files of an interrupted save or removal: not, say, a checkpoint that DeepSpeed wrote, nor an
    index, which may be damaged or end early but is the operator's to remove."""
    names = [entry.name for entry in os.scandir(checkpoint)]
    return all(FILE.fullmatch(name) for name in names)
