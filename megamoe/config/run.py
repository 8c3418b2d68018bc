"""Typed configuration of a run: what the command line of pretrain.py owns."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from megamoe.config.alert_targets import AlertTarget
from megamoe.config.cli import LAST, Options, make_app, parse
from megamoe.config.model import load_preset
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_regular

Tracker = Literal["wandb", "trackio", "csv"]
Recompute = Literal["whole", "selective"]  # what of a block backward recomputes, see `model/recompute.py`


class Corpus(BaseModel):
    """One source of training tokens: a prepared folder, or the prefix of a .bin/.idx pair, with its weight in a mix."""

    model_config = ConfigDict(frozen=True)

    path: str
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def __str__(self) -> str:
        return self.path if self.weight == 1 else f"{self.path}={self.weight:g}"


def _from_text(parse: Callable[[str], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def parse_corpus(value: str) -> dict[str, Any]:
    """`PATH` or `PATH=WEIGHT` from the command line."""
    path, separator, weight = value.rpartition("=")
    if not separator:
        return {"path": value}
    try:
        return {"path": path, "weight": float(weight)}
    except ValueError:
        raise ValueError(f"{value!r} has no number after the last '='; write PATH=WEIGHT.") from None


CorpusOption = Annotated[Corpus, _from_text(parse_corpus)]


class HeldOutSource(BaseModel):
    """A held-out set: a prepared folder, or the prefix of a .bin/.idx pair, and its name in the logs."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$")
    path: str


def parse_held_out(value: str) -> dict[str, str]:
    """`PATH` or `NAME=PATH` from the command line. A path has its folder's name; one with a "/" before its "=" is
    taken for a path alone."""
    name, separator, path = value.partition("=")
    if separator and "/" not in name:
        return {"name": name, "path": path}
    return {"name": short_name(value) or "valid", "path": value}


def short_name(path: str) -> str:
    """The name of a corpus in logs: that of its folder."""
    last = Path(os.path.abspath(path))
    last = last.with_suffix("") if last.suffix in (".bin", ".idx") else last
    return re.sub(r"[^\w.-]", "_", last.parent.name if last.name in ("train", "valid") else last.name)


def parse_duration(value: str) -> float:
    """Seconds of "90" (minutes), "1:30:00" or "2-12:00:00" (days), as Slurm writes them. Raises ValueError."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):(\d\d):(\d\d))|(\d+(?:\.\d+)?)", value)
    if not found:
        raise ValueError(f"{value!r} is no time; write minutes, H:MM:SS or D-HH:MM:SS.")
    days, hours, minutes, seconds, plain = found.groups()
    if plain:
        return 60 * float(plain)
    return ((24 * int(days or 0) + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)


HeldOutOption = Annotated[HeldOutSource, _from_text(parse_held_out)]
ONE_WORD_EACH = Parameter(accepts_keys=False, n_tokens=1)
PROMPT, MOST_PROMPTS = "In a quiet library,", 256


RECIPE_DIR = Path(__file__).parent / "recipes"
RECIPES = {  # by preset
    **dict.fromkeys(("tiny", "tiny-glm", "tiny-deepseek"), "tiny"),
    "tiny-plus": "tiny_plus",
    **dict.fromkeys(("small", "moe-680m", "moe-680m-plus"), "zero2"),
}


def find_recipe(name: str, preset: str) -> str:
    """Path of a DeepSpeed JSON: a shipped one by its name, or else `name` itself; for "" that of a shipped preset.
    Raises ValueError, or UserError where the preset does not exist."""
    shipped = {path.stem: str(path) for path in RECIPE_DIR.glob("*.json")}
    remedy = f"give the path of a DeepSpeed JSON, or one of {', '.join(sorted(shipped))}."
    if not name:
        if not Path(preset).exists():
            load_preset(preset)  # says that there is none
        if preset not in RECIPES:
            raise ValueError(f"no recipe is shipped for the preset {preset}; {remedy}")
        name = RECIPES[preset]
    elif name not in shipped and not name.endswith(".json") and not Path(name).exists():
        raise ValueError(f"{name} is neither a file nor the name of a shipped recipe; {remedy}")
    return shipped.get(name, name)


class Essentials(Options):
    preset: str = Field(
        default="moe-680m", description="name of a shipped preset, or path of its JSON or of a Hugging Face directory"
    )
    ds_config: str = Field(
        default="",
        validate_default=True,
        description="path of the DeepSpeed JSON, or the name of a shipped one; by default that of the preset",
    )

    @field_validator("ds_config")
    @classmethod
    def _find_recipe(cls, value: str, given: ValidationInfo) -> str:
        return find_recipe(value, given.data.get("preset", ""))


class Speed(Options, group="Speed and memory"):
    ep_size: int = Field(default=1, gt=0, description="ranks that share one set of experts (expert parallel size)")
    recompute_blocks: int = Field(
        default=0, ge=0, description="number of blocks, from the first on, whose activations backward recomputes"
    )
    recompute: Recompute = Field(
        default="whole",
        description="what of these blocks is recomputed: whole, or selective, which keeps the results of attention, of "
        "experts' GEMMs no wider than what they multiply, and of the all-to-all of rows",
    )
    compile: bool = Field(
        default=False,
        description="compile what lies around the experts' GEMMs in each block: faster steps, a later first one",
    )


class Schedule(Options, group="Length and schedule"):
    seq_len: int | None = Field(
        default=None, gt=1, description="tokens per sample; by default the preset's max_position_embeddings"
    )
    data_schedule: str | None = Field(
        default=None,
        description="path of a JSON file of phases with other data, lengths or batches",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="keep an average of the weights, of which so much stays at each step (0.999); by default none",
    )


class RunShape(Essentials, Speed, Schedule):
    """What a plan of a run depends on, too."""


class Length(Options, group="Length and schedule"):
    schedule_steps: int | None = Field(
        default=None,
        gt=0,
        description="end of the schedule, in place of the DeepSpeed JSON's total_num_steps",
    )
    time_limit: Annotated[float | None, _from_text(parse_duration)] = Field(
        default=None,
        gt=0,
        description="save and leave before this time since the start: minutes, H:MM:SS or D-HH:MM:SS; the end of a "
        "Slurm job counts in any case",
    )
    collective_timeout: float = Field(
        default=300,
        gt=0,
        lt=86_400,  # the timeout of the process groups, in launch/distributed.py
        description="seconds without progress of any rank, after which all exit and say where each is",
    )


class Data(Options, group="Data"):
    valid_data: Annotated[list[HeldOutOption], ONE_WORD_EACH] = Field(
        default=[],
        description="held-out sets, one or more PATH or NAME=PATH; by default the held-out split of the first --data "
        "folder",
    )
    packing: Literal["cut", "best_fit"] = Field(
        default="cut",
        description="how documents become samples: cut where a sample ends, or best_fit, which cuts none that fits "
        "into a sample",
    )
    cache_dir: str | None = Field(
        default=None, description="folder on local disk to cache object stores in; by default that of your caches"
    )
    cache_gib: float = Field(default=32, ge=1, description="most GiB of that cache, which the ranks of a host share")
    allow_changed_data: bool = Field(
        default=False, description="resume although data or tokenizer are not those that the run was trained on"
    )


def _lines(file: Path) -> list[str]:
    text = read_regular(file, "a text file with a prompt per line").decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()] or [""]  # a prompt that is refused


class Evaluation(Options, group="Log and evaluation"):
    log_interval: int = Field(default=10, gt=0, description="steps between two console lines")
    trackers: list[Tracker] = Field(
        default=[], description="trackers in addition to log.jsonl and TensorBoard: wandb, trackio, csv"
    )
    eval_interval: int = Field(default=500, ge=0, description="steps between two evaluations; 0: only at the end")
    eval_samples: int = Field(
        default=256, gt=0, description="samples of each held-out set used by an evaluation, at most"
    )
    lm_eval_tasks: list[str] = Field(
        default=[], description="tasks of lm-evaluation-harness to evaluate (pip install 'megamoe[eval]')"
    )
    lm_eval_interval: int = Field(
        default=0, ge=0, description="steps between two evaluations of these tasks; 0: only at the end"
    )
    lm_eval_folder: str | None = Field(
        default=None, description="folder of your own tasks (YAML), found before those of lm-evaluation-harness"
    )
    sample_interval: int = Field(
        default=0, ge=0, description="steps between two samples, which the model writes; 0: none"
    )
    sample_prompts: list[str] = Field(
        default=[PROMPT],
        min_length=1,
        description="one or more texts that samples continue, or .txt files of a text per line",
    )

    on_event: list[AlertTarget] = Field(
        default=[],
        description="commands, or http(s) URLs, that are told of starts, spikes and ends, as JSON on the standard "
        "input or by POST; '$NAME' takes one from the environment",
    )

    @field_validator("sample_prompts")
    @classmethod
    def _read_files(cls, values: list[str]) -> list[str]:
        return [text for value in values for text in (_lines(Path(value)) if value.endswith(".txt") else [value])]


class Checkpoints(Options, group="Checkpoints"):
    save_interval: int = Field(default=1000, ge=0, description="steps between two checkpoints; 0: only at the end")
    keep_last: int = Field(default=0, ge=0, description="newest checkpoints to keep; 0 keeps all")
    keep_every: int = Field(default=0, ge=0, description="keep checkpoints at multiples of this many steps as well")
    foreground_save: bool = Field(
        default=False, description="hold training while a checkpoint is written, instead of copying the state first"
    )


class Guarding(Options, group="Guard against spikes"):
    guard: Literal["off", "warn", "act"] = Field(
        default="warn", description="what is done about spikes of the loss or the gradient norm"
    )
    guard_deviations: float = Field(
        default=6.0,
        gt=0,
        allow_inf_nan=False,
        description="standard deviations above its window from which a step is a spike",
    )
    guard_window: int = Field(default=128, ge=4, le=4096, description="steps of that window, and of the smoothed loss")
    guard_margin: float = Field(
        default=0.5, gt=0, allow_inf_nan=False, description="nats of the smoothed loss above its best: a climb"
    )
    guard_skips: int = Field(
        default=10, gt=0, description="with --guard act, skipped steps in a row after which the run goes back"
    )
    guard_rollbacks: int = Field(
        default=3, ge=0, description="with --guard act, times that the run goes back to a checkpoint before it ends"
    )


class RunConfig(RunShape, Data, Length, Evaluation, Checkpoints, Guarding):
    """What the command line of a run owns. Each field is one option; its description is the option's help."""

    data: Annotated[list[CorpusOption], ONE_WORD_EACH] = Field(
        default=[Corpus(path="data/plays-2048")],
        min_length=1,
        description="one or more PATH or PATH=WEIGHT: a folder of megamoe prepare, a path or "
        "s3://, gs://; the prefix of .bin/.idx; or MODULE:NAME, a source of your own",
    )
    run_dir: str | None = Field(default=None, description="folder of this run; by default runs/PRESET")
    resume: bool = Field(default=False, description="resume from the newest checkpoint in the run folder")
    auto_resume: bool = Field(
        default=False, description="resume if the run folder holds a run, else begin: one command for both"
    )
    steps: int | None = Field(
        default=None, gt=0, description="stop after this step; by default the schedule's total_num_steps, if it has one"
    )
    init_from: str | None = Field(
        default=None,
        description="start from the weights in a checkpoint, a .pt or .safetensors file, or a Hugging Face directory",
    )
    seed: int = Field(default=1234, ge=0, lt=2**63, description="seed of weights, order of samples, dropout and jitter")
    dry_run: Annotated[bool, Parameter(alias="--dry-run")] = Field(
        default=False,
        description="build everything, train one step and save it aside, say how long and how large, keep nothing",
    )
    deterministic: bool = Field(
        default=False, description="on GPUs, repeat a run bit for bit, at the cost of speed; on CPU it always does"
    )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        names = [*(source.name for source in self.valid_data), *self.lm_eval_tasks]
        problems = [
            f"two of valid_data and lm_eval_tasks have the name {name}; leave one out, or write NAME=PATH with another."
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        problems += [
            f"valid_data: the name {name} is one of averaged weights' values in the log; write NAME=PATH with another."
            for name in names
            if name == "ema" or name.startswith("ema_")
        ]
        if (self.lm_eval_interval or self.lm_eval_folder) and not self.lm_eval_tasks:
            problems.append("lm_eval_interval and lm_eval_folder are of tasks, and none is given; add --lm_eval_tasks.")
        if problems:
            raise UserError(*problems)
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        preset = Path(os.path.abspath(self.preset))  # "." has a name too
        return Path(self.run_dir or Path("runs") / preset.name.removesuffix(".json"))


DEFAULTS = RunConfig()


def parse_run(words: list[str] | None = None) -> RunConfig:
    """A run of the command line, by default this process's; --help is printed, and gives none. Raises UserError."""
    app = make_app("pretrain.py", group_commands=LAST, help="Pretrain a Mixture-of-Experts decoder with DeepSpeed.")

    @app.default
    def run(options: RunConfig = DEFAULTS) -> RunConfig:
        return options

    return parse(app, sys.argv[1:] if words is None else words)()
