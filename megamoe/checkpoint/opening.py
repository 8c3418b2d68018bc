"""What is at a path: weights and optimizer state by plain names, whatever wrote them and for however many ranks; and
the model that they are of.

    IndexedFiles     what megamoe saves: each rank's slices of the fp32 masters and of the optimizer's state
    UniversalFiles   DeepSpeed's Universal Checkpoint: a folder for each parameter
    PlainFiles       a state_dict, safetensors, a Hugging Face directory of megamoe's own class: weights alone
    NativeFiles      a Hugging Face directory of a class of transformers: weights alone

Only what is asked for is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.universal import UniversalFiles
from megamoe.config.model import ModelConfig, validate
from megamoe.config.optimizers import AVERAGE
from megamoe.config.recipe import DTYPES, dtype_of
from megamoe.formats.config_json import differences, preset_of, read_directory
from megamoe.formats.native_files import NativeFiles, is_native
from megamoe.formats.plain_files import STATE_DICT_ENDINGS, PlainFiles, weight_files
from megamoe.formats.source import Source, View, load_weights
from megamoe.formats.source_checks import model_problems
from megamoe.model.decoder import Decoder
from megamoe.model.names import MTP
from megamoe.utils.errors import Problems, UserError
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


# --- the model --------------------------------------------------------------------------------------------------------


class OpenModel(NamedTuple):
    """A model whose weights are not read yet."""

    path: Path  # of the checkpoint or the files
    config: ModelConfig
    source: Source
    tokenizer: Path | None  # its tokenizer.json
    dtype: torch.dtype  # that a run trained in, or of a directory's config.json; fp32 where neither says

    def load(self, dtype: torch.dtype, device: torch.device) -> Decoder:
        """The model with its weights in `dtype`, in evaluation mode."""
        model = Decoder(self.config, seed=None)
        load_weights(model, self.source, dtype)
        return model.to(device).eval()


def open_model(path: Path, config: ModelConfig | None = None, ema: bool = False) -> OpenModel:
    """Find a model. Raises UserError where there is none, it is damaged, or its weights are not those of its
    configuration.

    Args:
        config: of weights that do not say what model they are of.
        ema: take the averaged weights of a run's checkpoint. Raises UserError where it holds none.
    """
    if (path / "config.json").is_file():
        source = open_source(path, ema)
        has_mtp = any(name.startswith(MTP) for name in source.shapes)  # which a config.json need not say
        own = preset_of(path).model_copy(update={"num_nextn_predict_layers": int(has_mtp)})
        return _checked(path, source, _agreed(config, own, path), _saved_in(path))
    if path.suffix == ".gguf":
        raise UserError(f"{path} is for llama.cpp and megamoe generate alone; give the model that it was made of.")
    if path.is_file():
        if config is None:
            raise UserError(f"{path} does not say what model it is of; give its preset.")
        return _checked(path, open_source(path, ema), config, torch.float32)
    is_run = (path / "run.json").is_file() and folders.age_of(path) is None  # a Universal Checkpoint has one too
    if is_run and not folders.step_folders(path / "checkpoints"):
        raise UserError(f"{path} holds no checkpoint yet; wait for the run to save one.")
    checkpoint = find_checkpoint(path)
    source, record = open_source(checkpoint, ema), run_record(checkpoint)
    saved = record.get("model")
    if isinstance(saved, dict):
        config = _agreed(config, validate(ModelConfig, saved, f"{checkpoint}: model"), checkpoint)
    elif config is None:
        raise UserError(
            f"{checkpoint} does not say what model it is of; give its preset, or put the run's run.json there."
        )
    ds = record.get("deepspeed")
    dtype = DTYPES[dtype_of(ds)] if isinstance(ds, dict) else torch.float32
    return _checked(checkpoint, source, config, dtype)


def tokenizer_of(path: Path) -> Path:
    """Where the tokenizer.json of a model is to be: with a file of weights or a Hugging Face directory, and for a
    checkpoint that has none, in its run folder."""
    folder = path.absolute().parent if path.is_file() else path.absolute()
    file = folder / "tokenizer.json"
    if file.is_file() or (folder / "config.json").is_file():
        return file
    if folders.step_folders(folder):
        folder = folder.parent
    elif folders.age_of(folder) or folders.is_complete(folder):
        folder = folder.parent.parent
    return folder / "tokenizer.json"


def _agreed(given: ModelConfig | None, own: ModelConfig, path: Path) -> ModelConfig:
    """The given configuration, or the model's own. Raises UserError where they are not of the same model."""
    fields = differences(given, own) if given else []
    if fields:
        raise UserError(
            f"{path} says itself what model it is of, and the given preset differs in {', '.join(fields)}; leave the "
            "preset out."
        )
    return given or own


def _saved_in(directory: Path) -> torch.dtype:
    """The dtype that a config.json gives for its weights."""
    values = read_json(directory / "config.json")
    name = values.get("dtype", values.get("torch_dtype"))
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    return known.get(name, torch.float32) if isinstance(name, str) else torch.float32


def _checked(path: Path, source: Source, config: ModelConfig, dtype: torch.dtype) -> OpenModel:
    Problems(model_problems(source, config, str(path))).refuse()
    tokenizer = tokenizer_of(path)
    return OpenModel(path, config, source, tokenizer if tokenizer.is_file() else None, dtype)
