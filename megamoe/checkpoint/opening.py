"""Read a model's weights and optimizer state by plain names, whatever wrote them and for however many ranks.

    IndexedFiles     what megamoe saves: each rank's slices of the fp32 masters and of the optimizer's state
    RankFiles        the same as DeepSpeed saves it
    UniversalFiles   DeepSpeed's Universal Checkpoint: a folder for each parameter
    PlainFiles       a state_dict, safetensors, a Hugging Face directory of megamoe's own class: weights alone
    NativeFiles      a Hugging Face directory of a class of transformers: weights alone

Only what is asked for is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.deepspeed_files import MAIN_FILE, RankFiles, UniversalFiles
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.formats.native_files import NativeFiles, is_native
from megamoe.formats.plain_files import STATE_DICT_ENDINGS, PlainFiles, weight_files
from megamoe.formats.source import Source
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json


def open_source(path: Path, open_files: int | None = None) -> Source:
    """Open a checkpoint folder, a file of plain weights, or a folder of them.

    The bytes of megamoe's own form are verified as they are read, those of others not at all. Raises UserError if it is
    none of these or cannot be read.
    """
    if folders.FILE.fullmatch(path.name) and path.is_file():
        raise UserError(f"{path} is one file of a checkpoint; give the folder, {path.parent}.")
    if path.is_file() and path.suffix in (".safetensors", *STATE_DICT_ENDINGS):
        return PlainFiles([path])
    if folders.has_index(path):
        return IndexedFiles(path, read_index(path))
    problem = verify.incomplete(path)
    if problem:
        raise UserError(problem)
    try:
        if (path / "zero").is_dir():
            return UniversalFiles(path)
        if (path / MAIN_FILE).is_file():
            return RankFiles(path, open_files)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not laid out as DeepSpeed lays out a checkpoint with experts ({error!r}); give another."
        ) from None
    if path.is_dir() and is_native(path):
        return _native_source(path)
    for suffix in (".safetensors", ".bin"):
        if files := weight_files(path, suffix):
            return PlainFiles(files)
    raise UserError(
        f"{path} holds no checkpoint and no weights; give a run folder, a checkpoint in it, a .pt or .safetensors "
        "file, or a Hugging Face directory."
    )


def _native_source(directory: Path) -> Source:
    files = weight_files(directory, ".safetensors")
    if not files:
        pickles = sorted(directory.glob("*.bin"))
        raise UserError(
            f"{directory} holds {f'{pickles[0].name}, a pickle, and ' if pickles else ''}no .safetensors; give one "
            "that holds the weights as safetensors."
        )
    return NativeFiles(directory, files)


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint in the run folder `path` of which every byte is what was saved, or `path` if it is one.

    Says in a line which newer ones were passed over. Raises UserError if none is verified.
    """
    found = folders.found_at(path)
    for checkpoint in found:
        problems = verify.problems(checkpoint)
        if not problems:
            return checkpoint
        if len(found) == 1:
            raise UserError(*problems)
        print(folders.passed_over(checkpoint, problems), flush=True)
    raise UserError(f"every checkpoint in {path} is damaged, as the lines above say; use another run folder.")


def run_record(checkpoint: Path) -> dict[str, Any]:
    """The record of the run that saved a checkpoint; empty where it is not known. Raises UserError."""
    if folders.has_index(checkpoint):
        return read_index(checkpoint).run
    path = checkpoint / "run.json"
    return read_json(path) if path.is_file() else folders.run_of(checkpoint) or {}
