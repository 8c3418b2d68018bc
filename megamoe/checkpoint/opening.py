"""Read a model's weights and optimizer state by plain names, whatever wrote them and for however many ranks.

    IndexedFiles     what megamoe saves: each rank's slices of the fp32 masters and of the optimizer's state
    UniversalFiles   DeepSpeed's Universal Checkpoint: a folder for each parameter
    PlainFiles       a state_dict, safetensors, a Hugging Face directory of megamoe's own class: weights alone
    NativeFiles      a Hugging Face directory of a class of transformers: weights alone

Only what is asked for is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.universal import UniversalFiles
from megamoe.config.optimizers import AVERAGE
from megamoe.formats.config_json import read_directory
from megamoe.formats.native_files import NativeFiles, is_native
from megamoe.formats.plain_files import STATE_DICT_ENDINGS, PlainFiles, weight_files
from megamoe.formats.source import Source, View
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json


def open_source(path: Path, ema: bool = False) -> Source:
    """Open a checkpoint folder, a file of plain weights, or a folder of them.

    Args:
        ema: the averaged weights of a run with --ema_decay in the place of the weights.

    The bytes of megamoe's own form are verified as they are read, those of others not at all. Raises UserError if it is
    none of these, cannot be read, or holds no averaged weights.
    """
    source = _open(path)
    if not ema:
        return source
    if AVERAGE.name not in source.state_names:
        raise UserError(
            f"{path} holds no averaged weights, which a run saves that trains with --ema_decay; give a checkpoint of "
            "one, or leave --ema out."
        )
    return View(source, {name: name for name in source.shapes}, source.buffers, AVERAGE.name)


def _open(path: Path) -> Source:
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
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not laid out as DeepSpeed lays out a Universal Checkpoint ({error!r}); give another."
        ) from None
    if path.is_dir() and is_native(path):
        return NativeFiles(path, *read_directory(path))
    for suffix in (".safetensors", ".bin"):
        if files := weight_files(path, suffix):
            return PlainFiles(files)
    raise UserError(
        f"{path} holds no checkpoint and no weights; give a run folder, a checkpoint in it, a .pt or .safetensors "
        "file, or a Hugging Face directory."
    )


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
