"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field, field_validator

from megamoe.checkpoint.opening import OpenModel, open_model
from megamoe.config.cli import Options, Positional
from megamoe.formats.config_json import find_preset


class Weights(Options, group="Model"):
    preset: str | None = Field(default=None, description="of weights that do not say what model they are of")
    ema: bool = Field(default=False, description="take the averaged weights of a run with --ema_decay")
    tokenizer: Path | None = Field(default=None, description="tokenizer.json; by default the model's own")


class ModelOptions(Weights):
    model: Positional[Path] = Field(description="a run, a checkpoint, a Hugging Face directory, or a file")

    def open(self) -> OpenModel:
        return open_model(self.model, find_preset(self.preset) if self.preset else None, ema=self.ema)


class Shards(Options):
    max_shard_gb: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="largest safetensors file, in GB")

    @property
    def shard_bytes(self) -> int:
        return int(self.max_shard_gb * 1e9)


class JsonFile(Options):
    json_file: Annotated[Path | None, Parameter(name="--json")] = Field(
        default=None, description="file to write all numbers to"
    )

    @field_validator("json_file")
    @classmethod
    def _check_folder(cls, file: Path | None) -> Path | None:
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise ValueError(f"{file} is no file of a folder that exists; give the path of one.")
        return file


class Sampling(Options, group="Sampling"):
    max_new_tokens: int = Field(default=120, ge=1, description="tokens to add")
    temperature: float = Field(default=0.8, ge=0, allow_inf_nan=False, description="0: the likeliest each time")
    top_k: int | None = Field(default=None, ge=1, description="sample from the K most likely tokens only")
    top_p: float | None = Field(default=None, gt=0, le=1, description="sample from the smallest set so probable")
    seed: int = Field(default=0, description="the same seed gives the same text")
    end_of_text: str | None = Field(default=None, description="token to stop at; by default the tokenizer's own")
