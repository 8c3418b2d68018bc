"""Typed configuration: the model's shape (a preset), the run (the command line), and the DeepSpeed JSON.

Every knob has one owner. The preset owns the shape, the DeepSpeed JSON owns precision, ZeRO, batch sizes, clipping,
optimizer and schedule, the command line owns paths and the length of the run. All problems are collected and raised
at once, as sentences that name the value, the limit and the remedy.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

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


class UserError(Exception):
    """Something the user can mend. `problems` holds one sentence each; programs print them and exit with code 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def unknown_key(where: str, key: str, known: Iterable[str]) -> str:
    """Say that `key` is unknown in `where`, with the nearest known one where there is one."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f'{where}: unknown key "{key}"' + (
        f'; did you mean "{near[0]}"?' if near else f"; known keys are {', '.join(sorted(known))}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError for a missing file, bad syntax, or a key given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and seen[key] != value:
                raise UserError(
                    f'{path}: "{key}" is given twice, as {json.dumps(seen[key])} and as {json.dumps(value)}; keep one.'
                )
            seen[key] = value
        return seen

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a JSON file.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend the syntax there.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where a JSON object of settings is needed.")
    return value


# --- the model ------------------------------------------------------------------------------------------------------


class ModelConfig(BaseModel):
    """Shape of the decoder. Field names are Hugging Face's where it has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(gt=0)
    """Rows of the embedding, which is also the head. Token ids must be below it."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    intermediate_size: int = Field(gt=0)
    """Width inside an expert."""
    num_hidden_layers: int = Field(gt=0)
    """Decoder blocks."""
    num_attention_heads: int = Field(gt=0)
    """Query heads."""
    num_key_value_heads: int = Field(gt=0)
    """Key/value heads; each serves num_attention_heads / num_key_value_heads query heads."""
    head_dim: int = Field(gt=0, multiple_of=2)
    """Size of one head; even, since RoPE turns pairs."""
    num_latent_tokens: int = Field(ge=0)
    """Learned, unrotated key/value positions ahead of every sequence, per layer."""
    max_position_embeddings: int = Field(gt=1)
    """Longest sequence the model is trained on, and the default sequence length of a run."""
    rope_theta: float = Field(default=10_000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J) instead of halves (GPT-NeoX, Llama)."""
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's form: {"rope_type": "linear" | "dynamic" | "yarn" | "llama3", "factor": ..., ...}."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in every RMSNorm."""
    num_local_experts: int = Field(gt=0)
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
        return [f"rope_scaling: rope_type is {kind!r}; use one of {', '.join(ROPE_SCALINGS)}."]
    problems = [unknown_key("rope_scaling", key, ROPE_SCALING_KEYS) for key in scaling.keys() - ROPE_SCALING_KEYS]
    missing = ROPE_SCALINGS[kind] - scaling.keys()
    if missing:
        problems.append(f'rope_scaling: "{kind}" needs {", ".join(sorted(missing))} too; add it.')
    for key, value in scaling.items():
        if key != "rope_type" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            problems.append(f"rope_scaling: {key} is {json.dumps(value)}; give a number above 0.")
    return problems


def preset_names() -> list[str]:
    """Names of the presets that ship with megamoe."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.json"))


def load_preset(name: str) -> ModelConfig:
    """Load a shipped preset by name, or one of the user's by the path of its JSON file. Raises UserError."""
    path = Path(name) if name.endswith(".json") else PRESET_DIR / f"{name}.json"
    if not path.is_file():
        raise UserError(
            f"preset {name!r} does not exist; use one of {', '.join(preset_names())}, or the path of a .json file."
        )
    return validate(ModelConfig, read_json(path), str(path))


def validate(model: type[Any], values: dict[str, Any], where: str) -> Any:
    """Build a pydantic `model` from `values`; every problem becomes one sentence of a single UserError."""
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
    return f'{where}: "{key}" is {json.dumps(detail["input"], default=str)}, but it {rule}; change it.'


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
    resume: bool = Field(default=False, description="go on from the newest checkpoint in the run folder")
    ep_size: int = Field(default=1, gt=0, description="ranks that share one set of experts (expert parallel size)")
    seq_len: int | None = Field(
        default=None, gt=1, description="tokens per sample; by default the preset's max_position_embeddings"
    )
    steps: int | None = Field(
        default=None, gt=0, description="stop after this step; by default the schedule's total_num_steps"
    )
    seed: int = Field(default=1234, ge=0, description="seed of weights, order of samples, dropout and jitter")
    log_interval: int = Field(default=10, gt=0, description="steps between two console lines")
    eval_interval: int = Field(default=500, ge=0, description="steps between two evaluations; 0: only at the end")
    eval_samples: int = Field(default=256, gt=0, description="held-out samples used by an evaluation, at most")
    save_interval: int = Field(default=1000, ge=0, description="steps between two checkpoints; 0: only at the end")


# --- the DeepSpeed JSON ---------------------------------------------------------------------------------------------

# Known keys by section, "" being the top level. What is not listed here, DeepSpeed checks itself.
DS_KEYS: dict[str, set[str]] = {
    "": {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "steps_per_print", "optimizer", "scheduler", "bf16", "fp16", "zero_optimization", "data_types",
        "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown", "dump_state", "checkpoint", "aio",
        "comms_logger", "flops_profiler", "tensorboard", "wandb", "comet", "csv_monitor", "keep_in_fp32_modules"},
    "optimizer": {"type", "params"},
    "optimizer.params": {
        "lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "fused", "foreach", "bias_correction",
        "amsgrad"},
    "scheduler": {"type", "params"},
    "scheduler.params": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_type"},
    "bf16": {
        "enabled", "check_grad_overflow", "immediate_grad_update", "bf16_optimizer_states",
        "bf16_master_weights_and_grads"},
    "fp16": {
        "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
        "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"},
    "zero_optimization": {
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
        "allgather_bucket_size", "overlap_comm", "round_robin_gradients", "offload_optimizer", "cpu_offload",
        "elastic_checkpoint", "ignore_unused_parameters", "use_multi_rank_bucket_allreduce"},
    "zero_optimization.offload_optimizer": {
        "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio"},
    "data_types": {"grad_accum_dtype"},
    "tensorboard": {"enabled", "output_path", "job_name"},
}  # fmt: skip


class ScheduleConfig(BaseModel):
    """Numbers of the learning-rate schedule, under the names of DeepSpeed's WarmupDecayLR."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_max_lr: float = Field(gt=0)
    """Learning rate at the end of the warm-up."""
    warmup_num_steps: int = Field(ge=0)
    """Steps of linear warm-up."""
    total_num_steps: int = Field(gt=0)
    """Step at which the learning rate has come down to 0."""
    warmup_min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at step 0."""
    warmup_type: Literal["linear"]
    """Must be said: DeepSpeed's own default is "log"."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        warmup, total = self.warmup_num_steps, self.total_num_steps
        if warmup >= total:
            raise UserError(f"warmup_num_steps is {warmup}, not below total_num_steps {total}; lower it.")
        return self


def read_schedule(ds: dict[str, Any], where: str) -> ScheduleConfig:
    """The schedule in a DeepSpeed JSON. Raises UserError."""
    section = ds.get("scheduler", {})
    problems = _key_problems(section, "scheduler", where)
    if problems:
        raise UserError(*problems)
    kind, params = section.get("type"), section.get("params", {})
    if kind != "WarmupDecayLR":
        raise UserError(f'{where}: "scheduler" is {kind!r}; give {{"type": "WarmupDecayLR", "params": {{...}}}}.')
    return validate(ScheduleConfig, params, f"{where}: scheduler.params")


def dtype_of(ds: dict[str, Any]) -> Literal["bf16", "fp16", "fp32"]:
    """Precision of weights and activations that a DeepSpeed JSON asks for."""
    for name in ("bf16", "fp16"):
        if _section(ds, name).get("enabled"):
            return name  # type: ignore[return-value]
    return "fp32"


def batch_sizes(ds: dict[str, Any], world_size: int) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps), completed from whichever of DeepSpeed's three keys are given.

    Raises UserError if they are missing or disagree.
    """
    total, micro, accumulation = (
        ds.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    for key, value in (
        ("train_batch_size", total),
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f'"{key}" is {json.dumps(value)}; give a whole number of at least 1.')
    if micro is None:
        if total is None:
            raise UserError('no batch size is given; add "train_micro_batch_size_per_gpu".')
        accumulation = accumulation or 1
        micro = max(total // (world_size * accumulation), 1)
    elif accumulation is None:
        accumulation = max(total // (world_size * micro), 1) if total else 1
    if total is not None and total != micro * accumulation * world_size:
        raise UserError(
            f'"train_batch_size" is {total}, but {micro} per rank x {accumulation} accumulation x {world_size} ranks '
            f"is {micro * accumulation * world_size}; change one of them or leave one out."
        )
    return micro, accumulation


def deepspeed_problems(ds: dict[str, Any], where: str, world_size: int, on_cpu: bool) -> list[str]:
    """Everything in a DeepSpeed JSON that megamoe cannot run, one sentence each."""
    problems = _key_problems(ds, "", where) + _zero_problems(ds, where) + _precision_problems(ds, where, on_cpu)
    try:
        batch_sizes(ds, world_size)
    except UserError as error:
        problems += [f"{where}: {problem}" for problem in error.problems]
    optimizer = _section(ds, "optimizer")
    if "optimizer" not in ds or (ds["optimizer"] == optimizer and not isinstance(optimizer.get("type"), str)):
        key = '"optimizer.type"' if "optimizer" in ds else '"optimizer"'
        problems.append(f'{where}: {key} is missing; give "optimizer": {{"type": "AdamW", "params": {{...}}}}.')
    try:
        schedule = read_schedule(ds, where)
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    else:
        lr = _section(optimizer, "params").get("lr")
        if lr is not None and lr != schedule.warmup_max_lr:
            problems.append(
                f"{where}: the peak learning rate is given twice, as optimizer.params.lr {lr} and as "
                f"scheduler.params.warmup_max_lr {schedule.warmup_max_lr}; leave optimizer.params.lr out."
            )
    return problems


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; empty where there is none or it is no object, which is reported elsewhere."""
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def _key_problems(section: Any, name: str, where: str) -> list[str]:
    known = DS_KEYS.get(name)
    if known is None:
        return []
    if not isinstance(section, dict):
        return [f'{where}: "{name}" is {json.dumps(section)}; give an object with {", ".join(sorted(known))}.']
    problems = []
    for key, value in section.items():
        inner = f"{name}.{key}" if name else key
        if key not in known:
            problems.append(unknown_key(f"{where}: {name}" if name else where, key, known))
        elif inner != "optimizer.params" or section.get("type") in ("Adam", "AdamW"):  # each has parameters of its own
            problems += _key_problems(value, inner, where)
    return problems


def _zero_problems(ds: dict[str, Any], where: str) -> list[str]:
    zero = _section(ds, "zero_optimization")
    if ds.get("zero_optimization", {}) != zero:
        return []  # reported as no object
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        why = "DeepSpeed refuses ZeRO-3 with its MoE layer" if stage == 3 else "megamoe trains with ZeRO-1 or ZeRO-2"
        return [f"{where}: zero_optimization.stage is {json.dumps(stage)}; {why}: set it to 1 or 2."]
    return [
        f"{where}: zero_optimization.{key} is false, but ZeRO-2 with experts needs it; set it to true."
        for key in ("contiguous_gradients", "reduce_scatter")
        if stage == 2 and zero.get(key) is False
    ]


def _precision_problems(ds: dict[str, Any], where: str, on_cpu: bool) -> list[str]:
    fp16, bf16 = _section(ds, "fp16"), _section(ds, "bf16")
    problems = [
        f"{where}: {name}.enabled is {json.dumps(section['enabled'])}; set it to true or false."
        for name, section in (("bf16", bf16), ("fp16", fp16))
        if not isinstance(section.get("enabled", False), bool)
    ]
    if fp16.get("enabled") and bf16.get("enabled"):
        return [*problems, f"{where}: the precision is given twice, bf16 and fp16 are both enabled; disable one."]
    scale = fp16.get("loss_scale")
    if fp16.get("enabled") and on_cpu and not (isinstance(scale, (int, float)) and scale > 0):
        problems.append(
            f"{where}: fp16 on CPU has no loss scale (fp16.loss_scale is {json.dumps(scale)}); "
            "give a number above 0 there, or use bf16."
        )
    return problems


# --- all together ---------------------------------------------------------------------------------------------------


def run_problems(run: RunConfig, model: ModelConfig, ds: dict[str, Any], world_size: int) -> list[str]:
    """What does not fit between the three owners, one sentence each."""
    problems = []
    if world_size % run.ep_size:
        problems.append(f"ep_size is {run.ep_size}, which does not divide the {world_size} ranks; choose a divisor.")
    if model.num_local_experts % run.ep_size:
        problems.append(
            f"ep_size is {run.ep_size}, which does not divide the {model.num_local_experts} experts of "
            f"{run.preset}; choose a divisor."
        )
    try:
        total = read_schedule(ds, run.ds_config).total_num_steps
    except UserError:
        return problems  # already reported with the JSON
    if run.steps and run.steps > total:
        problems.append(
            f"steps is {run.steps}, but the schedule in {run.ds_config} reaches a learning rate of 0 at step {total}; "
            "lower --steps or raise total_num_steps."
        )
    return problems
