"""The DeepSpeed JSON as a `Recipe`: parsed once, with every check of it against itself.

`recipe_sections.py` has its keys, `schedule.py` the schedule, `optimizers.py` the optimizers, `run_checks.py` what must
fit with the other owners of settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megamoe.config.model import validate
from megamoe.config.optimizers import OPTIMIZERS, OptimizerSpec, Params, find_optimizer
from megamoe.config.recipe_sections import (
    REFUSED,
    SECTIONS,
    TRACKER_SECTIONS,
    BatchSizes,
    Bf16,
    Dtype,
    FileTracker,
    Fp16,
    TensorBoard,
    TopLevel,
    Wandb,
    Zero,
    refused_problems,
)  # fmt: skip
from megamoe.config.schedule import Schedule, parse_schedule
from megamoe.utils.errors import Problems, SoundFields, UserError, broken_rules, shown
from megamoe.utils.json_files import read_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Choice = Literal["bf16", "fp32"]
TOKEN_KEYS = ("warmup_num_tokens", "decay_num_tokens", "total_num_tokens")  # of scheduler.params, for those in steps


@dataclass(frozen=True)
class Recipe:
    """A checked DeepSpeed JSON, for a number of ranks and a device."""

    where: str  # its path, for messages
    world_size: int
    on_cpu: bool
    auto: Choice  # what "auto" stands for in it
    written: dict[str, Any]
    json: dict[str, Any]  # with `auto` in place of "auto": for the record of a run, and what reads that
    dtype: Dtype  # of weights and activations
    bf16: Bf16
    fp16: Fp16
    zero: Zero
    tensorboard: TensorBoard
    wandb: Wandb
    csv_monitor: FileTracker
    micro_batch: int  # samples per rank and forward pass
    accumulation: int  # micro-batches per step
    train_batch_size: int | None  # as given; None where it follows from the others
    sum_dtype: Dtype  # that gradients of several micro-batches are summed in
    communication_dtype: Dtype  # that they are reduced in
    optimizer: OptimizerSpec
    optimizer_params: Params
    schedule: Schedule
    counts_collectives: bool
    tokens: dict[str, int]  # of a schedule that counts them, by the key whose steps they stand for

    def in_steps(self, step_after: Callable[[int], int]) -> Recipe:
        """The recipe with a schedule in steps. Raises UserError.

        Args:
            step_after: the step with which so many tokens are reached.
        """
        counts, total = self.tokens, self.tokens.get("total_num_steps", 0)
        steps = {key: step_after(count) for key, count in counts.items()}
        if "decay_num_steps" in counts:  # counted from the end
            steps["decay_num_steps"] = step_after(total) - step_after(total - counts["decay_num_steps"])
        return self.replaced({f"scheduler.params.{key}": count for key, count in steps.items()}) if steps else self

    def json_for_deepspeed(self) -> dict[str, Any]:
        """A copy without what is ours: DeepSpeed would start monitors of its own."""
        return copy.deepcopy({key: value for key, value in self.json.items() if key not in TRACKER_SECTIONS})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as `dtype`."""
        return DTYPES[self.dtype]

    @property
    def is_auto(self) -> bool:
        """Whether the JSON leaves the choice between bf16 and fp32 to the device."""
        return self.written.get("bf16") != self.json.get("bf16")

    @property
    def checks_overflow(self) -> bool:
        """Whether DeepSpeed looks for gradients that are not finite."""
        return self.dtype == "fp16" or (self.dtype == "bf16" and self.bf16.check_grad_overflow)

    @property
    def samples(self) -> int:
        """Per step, over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def reduces_once(self) -> bool:
        """Whether gradients are summed on each rank and reduced at the end of a step (`training/reduce_once.py`)."""
        return self.zero.stage == 1 and not self.zero.offloads_optimizer

    @property
    def operator_builder(self) -> str | None:
        """Name of DeepSpeed's builder for the operator that it compiles for the optimizer; None where it takes
        torch's."""
        if not self.optimizer.builders or getattr(self.optimizer_params, "torch_adam", False):
            return None
        return self.optimizer.builders[self.zero.offloads_optimizer]

    def replaced(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values, checked again. Raises UserError.

        Args:
            changes: by the path of their keys in the JSON, such as "scheduler.params.total_num_steps"; None removes
                one.
        """
        values = copy.deepcopy(self.written)
        for path, value in changes.items():
            *outer, key = path.split(".")
            section = values
            for name in outer:
                section = section.setdefault(name, {})
                if not isinstance(section, dict):
                    raise UserError(f'{self.where}: "{name}" of {path} is {shown(section)}, no section; change it.')
            section[key] = value
            if value is None:
                del section[key]
        return parse_recipe(values, self.where, self.world_size, self.on_cpu, self.auto)


def read_recipe(path: str, world_size: int, on_cpu: bool, auto: Choice) -> Recipe:
    """The recipe in a file, as `parse_recipe` checks it. Raises UserError."""
    return parse_recipe(read_json(Path(path)), path, world_size, on_cpu, auto)


def parse_recipe(
    values: dict[str, Any], where: str, world_size: int, on_cpu: bool, auto: Choice, problems: Problems | None = None
) -> Any:
    """The Recipe in a DeepSpeed JSON. Raises one UserError with all its problems.

    Args:
        where: its path, for messages.
        auto: what "auto" in its "bf16" section stands for, which DeepSpeed itself takes for fp32.
        problems: takes them in place of the UserError. Where there are any, what comes back has the fields of a Recipe
            alone that are right.
    """
    found = Problems(f"{where}: {problem}" for problem in refused_problems(values))
    values, tokens = _tokens_as_steps(values, where, found)
    json = _resolved(values, auto)
    rest = {key: value for key, value in json.items() if key not in REFUSED and key not in BatchSizes.model_fields}
    sizes = {key: value for key, value in json.items() if key in BatchSizes.model_fields}
    top = found.attempt(validate, TopLevel, rest, where)
    batch = found.attempt(validate, BatchSizes, sizes, where)
    split = batch and found.attempt(batch_sizes, batch, world_size, where)
    sound = SoundFields(dtype=dtype_of(json), has_bf16=dtype_of(values) == "bf16", on_cpu=on_cpu, world_size=world_size)
    if split:
        sound.micro_batch, sound.accumulation = split
    optimizer: Any = find_optimizer(_section(json, "optimizer.type"))
    sections = {**SECTIONS, **({"optimizer.params": optimizer.params} if optimizer else {})}
    for name, kind in sections.items():
        if parsed := found.attempt(validate, kind, _section(json, name), f"{where}: {name}"):
            setattr(sound, name.replace(".", "_"), parsed)
    params: Any = getattr(sound, "optimizer_params", None)
    # Without the optimizer's settings, which are wrong then, any peak will do to find what is wrong with the schedule.
    if schedule := found.attempt(parse_schedule, json.get("scheduler", {}), params.lr if params else 1.0, where):
        sound.schedule = schedule
    found += [f"{where}: {problem}" for problem in broken_rules(RULES, sound)]
    if found and problems is not None:
        problems += found
        return sound
    found.refuse()
    return Recipe(
        where=where,
        world_size=world_size,
        on_cpu=on_cpu,
        auto=auto,
        written=values,
        json=json,
        dtype=sound.dtype,
        bf16=sound.bf16,
        fp16=sound.fp16,
        zero=sound.zero_optimization,
        **{name: getattr(sound, name) for name in TRACKER_SECTIONS},
        micro_batch=sound.micro_batch,
        accumulation=sound.accumulation,
        train_batch_size=batch.train_batch_size,
        sum_dtype=sound.data_types.grad_accum_dtype or sound.dtype,
        communication_dtype=top.communication_data_type or sound.dtype,
        optimizer=optimizer,
        optimizer_params=params,
        schedule=schedule,
        counts_collectives=sound.comms_logger.enabled,
        tokens=tokens,
    )


def _tokens_as_steps(values: dict[str, Any], where: str, problems: Problems) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings whose schedule counts tokens, with these in place of steps until `Recipe.in_steps`, and their numbers.
    That a schedule counts both is added to `problems`."""
    params = _section(values, "scheduler.params")
    counts = {key: params[key] for key in TOKEN_KEYS if isinstance(params, dict) and key in params}
    if not counts:
        return values, {}
    rest = {key: value for key, value in params.items() if key not in counts}
    if mixed := [key for key in rest if key.endswith("_num_steps")]:
        problems.append(f"{where}: scheduler.params counts tokens, but {', '.join(mixed)} steps; give all in one unit.")
    tokens = {key.replace("tokens", "steps"): value for key, value in counts.items()}
    scheduler = {**values["scheduler"], "params": {**rest, **tokens}}
    numbers = {
        key: int(value) for key, value in tokens.items() if isinstance(value, (int, float))
    }  # others are refused
    return {**values, "scheduler": scheduler}, numbers


def _section(values: Any, path: str) -> Any:
    """What is at a path of keys; an empty object where nothing is."""
    for key in path.split("."):
        values = values.get(key, {}) if isinstance(values, dict) else {}
    return values


def dtype_of(json: dict[str, Any]) -> Dtype:
    """Precision of weights and activations in a DeepSpeed JSON, as it is written or as the record of a run has it."""
    for name in ("bf16", "fp16"):
        section = json.get(name)
        if isinstance(section, dict) and section.get("enabled") not in (None, False):
            return name  # type: ignore[return-value]
    return "fp32"


def batch_sizes(keys: BatchSizes, world_size: int, where: str) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps), completed from whichever of DeepSpeed's three keys are given.

    Raises UserError if they are missing or disagree.
    """
    total, micro = keys.train_batch_size, keys.train_micro_batch_size_per_gpu
    accumulation = keys.gradient_accumulation_steps
    if micro is None:
        if total is None:
            raise UserError(f'{where}: no batch size is given; add "train_micro_batch_size_per_gpu".')
        accumulation = accumulation or 1
        micro = max(total // (world_size * accumulation), 1)
    elif accumulation is None:
        accumulation = max(total // (world_size * micro), 1) if total else 1
    if total is not None and total != micro * accumulation * world_size:
        raise UserError(
            f'{where}: "train_batch_size" is {total}, but {micro} per rank x {accumulation} accumulation x '
            f"{world_size} ranks is {micro * accumulation * world_size}; change one of them or leave one out."
        )
    return micro, accumulation


def _resolved(values: dict[str, Any], auto: Choice) -> dict[str, Any]:
    bf16 = values.get("bf16")
    if not isinstance(bf16, dict) or bf16.get("enabled") != "auto":
        return values
    return {**values, "bf16": {**bf16, "enabled": auto == "bf16"}}


def _one_precision(m: Any) -> Iterator[str]:
    if m.fp16.enabled and m.has_bf16:
        yield "the precision is given twice, bf16 and fp16 are both enabled; disable one."
    elif m.fp16.enabled and m.on_cpu and not m.fp16.loss_scale:
        scale = shown(m.fp16.loss_scale)
        yield (f"fp16 on CPU has no loss scale (fp16.loss_scale is {scale}); give a number above 0 there, or use bf16.")


def _zero(m: Any) -> Iterator[str]:
    zero = m.zero_optimization
    for key in ("contiguous_gradients", "reduce_scatter"):
        if zero.stage == 2 and not getattr(zero, key):
            yield f"zero_optimization.{key} is false, but ZeRO-2 with experts needs it; set it to true."
    if zero.round_robin_gradients:
        yield (
            "zero_optimization.round_robin_gradients is true, but then a checkpoint does not say which values are "
            "whose and could not be resumed on other ranks; leave it out."
        )


def _offloads(m: Any) -> bool:
    """As `Zero.offloads_optimizer`, of a section that may be wrong."""
    return m.zero_optimization_offload_optimizer.device != "none"


def _known_optimizer(m: Any) -> Iterator[str]:
    kind = m.optimizer.type
    spec = find_optimizer(kind)
    if kind is None:
        yield '"optimizer.type" is missing; give "optimizer": {"type": "AdamW", "params": {...}}.'
    elif not spec or kind not in spec.names:
        known = [name for one in OPTIMIZERS for name in one.names]
        yield f"optimizer.type is {shown(kind)}; use one of {', '.join(known)}."


def _optimizer_needs(m: Any) -> Iterator[str]:
    kind = m.optimizer.type
    spec = find_optimizer(kind)
    if spec and spec.splits_matrices and _offloads(m):
        yield (
            f"optimizer.type is {shown(kind)}, whose GEMMs an offloaded step would leave to the host's "
            'cores; leave "offload_optimizer" out of zero_optimization, or use "AdamW".'
        )
    if spec and spec.offloaded_on_cpu and m.on_cpu and not _offloads(m):
        yield (
            f"optimizer.type is {shown(kind)}, which DeepSpeed runs on CPU only with its states offloaded; add "
            '"offload_optimizer": {"device": "cpu"} to zero_optimization, or use "AdamW".'
        )


def _one_peak(m: Any) -> Iterator[str]:
    schedule, params = m.schedule, m.optimizer_params
    owner = "optimizer.params.lr" if schedule.decay == "cosine" else "scheduler.params.warmup_max_lr"
    for key, value in (("lr", params.lr), ("adam_lr", getattr(params, "adam_lr", None))):
        if value is not None and value != schedule.peak:
            yield (
                f"the peak learning rate is given twice, as optimizer.params.{key} {value} and as {owner} "
                f"{schedule.peak}; leave optimizer.params.{key} out."
            )


RULES = (_one_precision, _zero, _known_optimizer, _optimizer_needs, _one_peak)
