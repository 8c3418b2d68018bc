"""A model from wherever it is: what it is of, its weights, its tokenizer.

a run folder            the newest checkpoint in it that is verified
one checkpoint          of a run
a Hugging Face folder   of megamoe's own export, or of a class of transformers in the table of architectures
.pt, .safetensors       plain weights, whose model the caller knows
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megamoe.architectures.config_json import preset_of
from megamoe.checkpoint import folders
from megamoe.checkpoint.reader import Source, find_checkpoint, load_weights, model_problems, open_source, run_record
from megamoe.config import ModelConfig, validate
from megamoe.ds_config import DTYPES, dtype_of
from megamoe.errors import UserError, shown
from megamoe.model.decoder import Decoder


class OpenModel(NamedTuple):
    """A model whose weights are not read yet."""

    path: Path  # of the checkpoint or the files
    config: ModelConfig
    source: Source
    tokenizer: Path | None  # its tokenizer.json
    dtype: torch.dtype  # that it was trained in; fp32 where that is not known

    def load(self, dtype: torch.dtype, device: torch.device) -> Decoder:
        """The model with its weights in `dtype`, in evaluation mode."""
        model = Decoder(self.config, seed=None)
        load_weights(model, self.source, dtype)
        return model.to(device).eval()


def open_model(path: Path, config: ModelConfig | None = None, open_files: int | None = None) -> OpenModel:
    """Find a model. Raises UserError where there is none, it is damaged, or its weights are not those of its
    configuration.

    Args:
        config: of weights that do not say what model they are of.
        open_files: most files that are kept open; None keeps all.
    """
    if (path / "config.json").is_file():
        source = open_source(path, open_files)
        return _checked(path, source, config or preset_of(path), torch.float32)
    if path.is_file():
        if config is None:
            raise UserError(f"{path} does not say what model it is of; give its preset.")
        return _checked(path, open_source(path), config, torch.float32)
    if (path / "run.json").is_file() and not folders.step_folders(path / "checkpoints"):
        raise UserError(f"{path} holds no checkpoint yet; wait for the run to save one.")
    checkpoint = find_checkpoint(path)
    source, record = open_source(checkpoint, open_files), run_record(checkpoint)
    config = config or _config_of(record, checkpoint)
    return _checked(checkpoint, source, config, _dtype_of(record, checkpoint))


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


def _checked(path: Path, source: Source, config: ModelConfig, dtype: torch.dtype) -> OpenModel:
    problems = model_problems(source, config, str(path))
    if problems:
        raise UserError(*problems)
    tokenizer = tokenizer_of(path)
    return OpenModel(path, config, source, tokenizer if tokenizer.is_file() else None, dtype)


def _config_of(record: dict[str, Any], checkpoint: Path) -> ModelConfig:
    model = record.get("model")
    if not isinstance(model, dict):
        raise UserError(
            f"{checkpoint} does not say what model it is of; give its preset, or put the run's run.json there."
        )
    return validate(ModelConfig, model, f"{checkpoint}: model")


def _dtype_of(record: dict[str, Any], checkpoint: Path) -> torch.dtype:
    ds = record.get("deepspeed", {})
    if not isinstance(ds, dict):
        raise UserError(f"{checkpoint}: deepspeed is {shown(ds)}, which no run has written; bring it back.")
    return DTYPES[dtype_of(ds)]
