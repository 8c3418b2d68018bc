"""The options of the verbs whose functions need torch, and those that several verbs have. Imports no torch, which takes
seconds: --help and what is wrong with a command line come at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field, field_validator, model_validator

from megamoe.config.cli import LAST, Options, Positional
from megamoe.config.run import PROMPT, RunConfig, RunShape
from megamoe.planning.options import PlanOptions
from megamoe.utils.errors import UserError

Form = Literal["state_dict", "safetensors", "huggingface", "gguf"]


class Weights(Options, group="Model"):
    preset: str | None = Field(default=None, description="of weights that do not say what model they are of")
    ema: bool = Field(default=False, description="take the averaged weights of a run with --ema_decay")
    tokenizer: Path | None = Field(default=None, description="tokenizer.json; by default the model's own")


class ModelOptions(Weights):
    model: Positional[Path] = Field(description="a run, a checkpoint, a Hugging Face directory, or a file")


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


class Chat(ModelOptions, Sampling):
    pass


class Generate(Chat):
    prompt: list[str] = Field(default=[PROMPT], description="one or more texts to continue")
    num_samples: int = Field(default=1, ge=1, description="continuations of each prompt")


class Windows(Options, group="Windows of text"):
    seq_len: int | None = Field(default=None, ge=1, description="tokens of a window; by default the model's most")
    stride: int | None = Field(default=None, ge=1, description="tokens from a window to the next; by default a window")
    batch_size: int = Field(default=8, ge=1, description="windows per rank and forward pass")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="in bf16 and fp16, numbers vary with the batch's shape"
    )


class Evaluate(ModelOptions, JsonFile, Windows):
    texts: Positional[list[Path]] = Field(
        default=[],
        description="text files, folders, JSON lines, prepared corpora (their held-out split) or prefixes",
    )
    end_of_text: str | None = Field(default=None, description="token before a document; by default its own")
    text_key: str = Field(default="text", description="key of the text in JSON lines")
    tasks: list[str] = Field(default=[], description="tasks of lm-evaluation-harness")
    task_folder: str | None = Field(default=None, description="folder of your own tasks (YAML), found first")
    ranks: int | None = Field(default=None, ge=1, description="ranks to start on this host, which share the work")

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if not self.texts and not self.tasks:
            raise UserError("there is nothing to evaluate on; give a TEXT, or --tasks.")
        if self.task_folder and not self.tasks:
            raise UserError(f"--task_folder is {self.task_folder}, but no task is asked for; add --tasks.")
        return self


class Convert(ModelOptions, Shards):
    out: Positional[Path] = Field(description="file or folder to write")
    to: Form | None = Field(default=None, description="form of OUT; by default from its ending")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="fp32: the masters as they are")
    keep_mtp: bool = Field(default=False, description="write multi-token prediction, which is left out else")
    dry_run: Annotated[bool, Parameter(alias="--dry-run")] = Field(
        default=False, description="list names, shapes and bytes, write nothing"
    )


class Inspect(Options):
    checkpoint: Positional[Path] = Field(description="folder of a run, or of one checkpoint")


class Plan(JsonFile, RunShape, PlanOptions):
    verbose: Annotated[bool, Parameter(group=LAST, show_default=False)] = Field(
        default=False, description="print traffic, the parts of a step and all that is assumed, too"
    )


class Doctor(JsonFile, RunConfig):
    ranks: int | None = Field(default=None, ge=1, description="ranks on this host; by default as megamoe train")
    hosts: int = Field(default=1, ge=1, description="hosts of the run, alike this one")
