"""Typed configuration of the model (a preset) and of the run (the command line); `ds_config.py` has the DeepSpeed JSON.

Every knob has one owner. The preset owns the shape, the DeepSpeed JSON owns precision, ZeRO, batch sizes, clipping,
optimizer and schedule, the command line owns paths and the length of the run. All problems are collected and raised
at once, as sentences that name the value, the limit and the remedy.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from megamoe import cli
from megamoe.errors import UserError, shown, unknown_key
from megamoe.json_files import read_json

PRESET_DIR = Path(__file__).parent / "presets"
ROPE_SCALINGS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
ROPE_SCALING_KEYS = {
    "rope_type",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
}.union(*ROPE_SCALINGS.values())


# --- the model ------------------------------------------------------------------------------------------------------


# Limits far above any real model; they keep a slip of the pen from filling the memory.
MAX_LAYERS = 10_000
MAX_EXPERTS = 2**18  # of all layers together
MAX_SIZE = 2**24  # of a dimension


class JsonModel(BaseModel):
    """Settings of a JSON file: a number in quotes is none, and 1e4 is a whole number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value


class ModelConfig(JsonModel):
    """Shape of the decoder. Field names are Hugging Face's where it has one."""

    vocab_size: int = Field(gt=0, le=MAX_SIZE)
    """Rows of the embedding, which is also the head. Token ids must be below it."""
    hidden_size: int = Field(gt=0, le=MAX_SIZE)
    """Width of the residual stream."""
    intermediate_size: int = Field(gt=0, le=MAX_SIZE)
    """Width inside an expert."""
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"] = "silu"
    """Activation inside an expert."""
    gated_mlp: bool = False
    """Experts of three matrices: the activation of a gate multiplies what goes in (SwiGLU, GEGLU, ...)."""
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    """Decoder blocks."""
    num_attention_heads: int = Field(gt=0, le=MAX_SIZE)
    """Query heads."""
    num_key_value_heads: int = Field(gt=0, le=MAX_SIZE)
    """Key/value heads; each serves num_attention_heads / num_key_value_heads query heads."""
    head_dim: int = Field(ge=4, le=MAX_SIZE, multiple_of=2)
    """Size of one head; even, since RoPE turns pairs."""
    num_latent_tokens: int = Field(ge=0, le=MAX_SIZE)
    """Learned, unrotated key/value positions before every sequence, per layer."""
    max_position_embeddings: int = Field(gt=1, le=2**32)
    """Longest sequence the model is trained on, and the default sequence length of a run."""
    rope_theta: float = Field(default=10_000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J) instead of halves (GPT-NeoX, Llama)."""
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's form: {"rope_type": "linear" | "dynamic" | "yarn" | "llama3", "factor": ..., ...}."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in every RMSNorm."""
    num_local_experts: int = Field(gt=0, le=MAX_EXPERTS)
    """Experts per layer (all of them, over all ranks; the name is Mixtral's)."""
    num_experts_per_tok: int = Field(gt=0)
    """Experts that each token is sent to (top-k)."""
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on an expert's output."""
    router_jitter_noise: float = Field(default=0.0, ge=0, lt=1)
    """Training only: the router's input is multiplied by a uniform draw from 1 - noise to 1 + noise."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    router_bias_rule: Literal["sign", "proportional"] = "sign"
    """How the balancing bias follows the running load."""
    router_bias_rate: float = Field(default=1e-3, ge=0)
    """Step of the balancing bias; 0 switches balancing off."""
    router_load_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of the expert loads."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @staticmethod
    def problems(values: dict[str, Any]) -> list[str]:
        """What does not fit between fields, one sentence each; fields that are wrong themselves are passed over."""
        problems = []
        heads, key_value_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
        if _positive(heads) and _positive(key_value_heads) and heads % key_value_heads:
            problems.append(
                f"num_attention_heads is {heads}, not a multiple of num_key_value_heads {key_value_heads}; "
                "choose a divisor of it."
            )
        top_k, experts = values.get("num_experts_per_tok"), values.get("num_local_experts")
        if _positive(top_k) and _positive(experts) and top_k > experts:
            problems.append(f"num_experts_per_tok is {top_k}, above num_local_experts {experts}; lower it.")
        layers = values.get("num_hidden_layers")
        if (
            _positive(layers)
            and _positive(experts)
            and layers <= MAX_LAYERS
            and layers * experts > MAX_EXPERTS >= experts
        ):
            problems.append(
                f"num_hidden_layers {layers} x num_local_experts {experts} is {layers * experts:,} experts, above the "
                f"limit of {MAX_EXPERTS:,}; lower one of them."
            )
        return problems + _rope_scaling_problems(values.get("rope_scaling"))

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        problems = self.problems(self.__dict__)
        if problems:
            raise UserError(*problems)
        return self


def _positive(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _rope_scaling_problems(scaling: Any) -> list[str]:
    if not isinstance(scaling, dict):
        return []
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        return [f"rope_scaling: rope_type is {shown(kind)}; use one of {', '.join(ROPE_SCALINGS)}."]
    missing = ROPE_SCALINGS[kind] - scaling.keys()
    problems = [f'rope_scaling: "{kind}" needs {", ".join(sorted(missing))} too; add it.'] if missing else []
    for key, value in scaling.items():
        if key not in ROPE_SCALING_KEYS:
            problems.append(unknown_key("rope_scaling", key, ROPE_SCALING_KEYS))
        elif key != "rope_type" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            problems.append(f"rope_scaling: {key} is {shown(value)}; give a number above 0.")
    return problems


def preset_names() -> list[str]:
    """Names of the presets that ship with megamoe."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.json"))


def load_preset(name: str) -> ModelConfig:
    """Load a shipped preset by name, or one of the user's by the path of its JSON file. Raises UserError."""
    path = Path(name) if name.endswith(".json") else PRESET_DIR / f"{name}.json"
    if not path.exists():
        raise UserError(
            f"preset {name!r} does not exist; use one of {', '.join(preset_names())}, or the path of a .json file."
        )
    return validate(ModelConfig, read_json(path), str(path))


def validate(model: type[Any], values: Any, where: str) -> Any:
    """Build a pydantic `model` from `values`; every problem becomes one sentence of a single UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: is {shown(values)} where an object of settings is needed; change it.")
    known = list(model.model_fields)
    try:
        return model(**values)
    except UserError as error:
        raise UserError(*(f"{where}: {problem}" for problem in error.problems)) from None
    except ValidationError as error:
        problems = [_sentence(detail, where, known) for detail in error.errors()]
        if hasattr(model, "problems"):
            problems += [f"{where}: {problem}" for problem in model.problems(values)]
        raise UserError(*problems) from None


def _sentence(detail: Any, where: str, known: list[str]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_key(where, key, known)
    if detail["type"] == "missing":
        choice = ' as "linear", for DeepSpeed\'s own default is "log"' if key == "warmup_type" else ""
        return f'{where}: "{key}" is missing; add it{choice}.'
    if detail["type"] == "value_error":
        return f"{where}: {key}: {detail['msg'].removeprefix('Value error, ')}"
    rule = detail["msg"].removeprefix("Input ")
    return f'{where}: "{key}" is {shown(detail["input"])}, but it {rule}; change it.'


# --- the run --------------------------------------------------------------------------------------------------------


class Corpus(BaseModel):
    """One source of training tokens: a prepared folder, or the prefix of a .bin/.idx pair, with its weight in a mix."""

    model_config = ConfigDict(frozen=True)

    path: str
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


def parse_corpus(value: Any) -> Any:
    """`PATH` or `PATH=WEIGHT` from the command line."""
    if not isinstance(value, str):
        return value
    path, separator, weight = value.rpartition("=")
    if not separator:
        return {"path": value}
    try:
        return {"path": path, "weight": float(weight)}
    except ValueError:
        raise ValueError(f"{value!r} has no number after the last '='; write PATH=WEIGHT.") from None


def parse_duration(value: Any) -> Any:
    """Seconds of "90" (minutes), "1:30:00" or "2-12:00:00" (days), as Slurm writes them. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):(\d\d):(\d\d))|(\d+(?:\.\d+)?)", value)
    if not found:
        raise ValueError(f"{value!r} is no time; write minutes, H:MM:SS or D-HH:MM:SS.")
    days, hours, minutes, seconds, plain = found.groups()
    if plain:
        return 60 * float(plain)
    return ((24 * int(days or 0) + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)


class RunConfig(BaseModel):
    """What the command line of pretrain.py owns. Each field is one option; its description is the option's help."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ds_config: str = Field(description="path of the DeepSpeed JSON")
    preset: str = Field(default="moe-680m", description="name of a shipped preset, or path of a preset's JSON")
    data: list[Annotated[Corpus, BeforeValidator(parse_corpus)]] = Field(
        default=[Corpus(path="data/shakespeare")],
        min_length=1,
        description="one or more PATH or PATH=WEIGHT: a folder of tools/prepare_data.py, or the prefix of .bin/.idx",
    )
    valid_data: str | None = Field(
        default=None, description="held-out corpus; by default the held-out split of the first --data folder"
    )
    run_dir: str | None = Field(default=None, description="folder of this run; by default runs/PRESET")
    resume: bool = Field(default=False, description="resume from the newest checkpoint in the run folder")
    auto_resume: bool = Field(
        default=False, description="resume if the run folder holds a run, else begin: one command for both"
    )
    time_limit: Annotated[float | None, BeforeValidator(parse_duration)] = Field(
        default=None,
        gt=0,
        description="save and leave before this time since the start: minutes, H:MM:SS or D-HH:MM:SS; the end of a "
        "Slurm job counts in any case",
    )
    collective_timeout: float = Field(
        default=300,
        gt=0,
        lt=86_400,  # the timeout of the process groups, in training/distributed.py
        description="seconds without progress of any rank, after which all exit and say where each is",
    )
    ep_size: int = Field(default=1, gt=0, description="ranks that share one set of experts (expert parallel size)")
    seq_len: int | None = Field(
        default=None, gt=1, description="tokens per sample; by default the preset's max_position_embeddings"
    )
    recompute_blocks: int = Field(
        default=0, ge=0, description="number of blocks, from the first on, whose activations backward recomputes"
    )
    compile: bool = Field(
        default=False,
        description="compile what lies around the experts' products in each block: faster steps, a later first one",
    )
    steps: int | None = Field(
        default=None, gt=0, description="stop after this step; by default the schedule's total_num_steps"
    )
    seed: int = Field(default=1234, ge=0, lt=2**63, description="seed of weights, order of samples, dropout and jitter")
    log_interval: int = Field(default=10, gt=0, description="steps between two console lines")
    eval_interval: int = Field(default=500, ge=0, description="steps between two evaluations; 0: only at the end")
    eval_samples: int = Field(default=256, gt=0, description="held-out samples used by an evaluation, at most")
    save_interval: int = Field(default=1000, ge=0, description="steps between two checkpoints; 0: only at the end")
    keep_last: int = Field(default=0, ge=0, description="newest checkpoints to keep; 0 keeps all")
    keep_every: int = Field(default=0, ge=0, description="keep checkpoints at multiples of this many steps as well")
    deterministic: bool = Field(
        default=False, description="on GPUs, repeat a run bit for bit, at the cost of speed; on CPU it always does"
    )
    foreground_save: bool = Field(
        default=False, description="hold training while a checkpoint is written, instead of copying the state first"
    )
    init_from: str | None = Field(
        default=None,
        description="start from the weights in a checkpoint, a .pt or .safetensors file, or a Hugging Face directory",
    )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_dir or Path("runs") / Path(self.preset).stem)


def parse_run(arguments: list[str] | None = None) -> RunConfig:
    """The command line as a RunConfig. Raises UserError."""
    parser = cli.Parser(prog="pretrain.py", description="Pretrain a Mixture-of-Experts decoder with DeepSpeed.")
    default = [corpus.path for corpus in RunConfig.model_fields["data"].default]
    cli.add_fields(parser, RunConfig, data={"nargs": "+", "metavar": "PATH[=WEIGHT]", "default": default})
    parser.add_argument("--local_rank", help="given by the launcher; not used")
    return parser.parse(arguments, _run_of)


def _run_of(values: argparse.Namespace) -> RunConfig:
    given = {name: value for name, value in vars(values).items() if value is not None and name != "local_rank"}
    foreign = [word for word in sys.argv if not word.isascii() and word.encode(errors="replace").decode() != word]
    if foreign:  # no JSON could hold it
        raise UserError(f"command line: {foreign[0]!a} is not UTF-8; rename that.")
    return validate(RunConfig, given, "command line")
