"""The DeepSpeed JSON: what megamoe reads from it, and every check of it, against itself and against the other owners.

`recipe_keys.py` has its keys, `schedule.py` the schedule, `run_checks.py` what must fit with the other settings.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from megamoe.config.optimizers import OptimizerSpec, find_optimizer, optimizer_names, optimizer_params, unsaved_params
from megamoe.config.recipe_keys import ABOVE_0, OPTIMIZER_PARAMS, is_number, key_problems, value_problems, why
from megamoe.config.schedule import read_schedule
from megamoe.utils.errors import UserError, shown, unknown_key

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(ds: dict[str, Any]) -> Literal["bf16", "fp16", "fp32"]:
    """Precision of weights and activations that a DeepSpeed JSON asks for; "auto" counts as fp32 until `precision.py`
    has resolved it."""
    for name in ("bf16", "fp16"):
        if section_of(ds, name).get("enabled") not in (None, False, "auto"):
            return name  # type: ignore[return-value]
    return "fp32"


def batch_sizes(ds: dict[str, Any], world_size: int) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps), completed from whichever of DeepSpeed's three keys are given.

    Raises UserError if they are missing or disagree.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, accumulation = given = [ds.get(key) for key in keys]
    wrong = [
        f'"{key}" is {shown(value)}{why(value)}; give a whole number of at least 1.'
        for key, value in zip(keys, given, strict=True)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
    ]
    if wrong:
        raise UserError(*wrong)
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
    problems = key_problems(ds, "", where) + _zero_problems(ds, where) + _precision_problems(ds, where, on_cpu)
    try:
        batch_sizes(ds, world_size)
    except UserError as error:
        problems += [f"{where}: {problem}" for problem in error.problems]
    problems += _optimizer_problems(ds, where, on_cpu)
    try:
        schedule = read_schedule(ds, where)
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    else:
        params = section_of(section_of(ds, "optimizer"), "params")
        owner = "optimizer.params.lr" if schedule.decay == "cosine" else "scheduler.params.warmup_max_lr"
        problems += [
            f"{where}: the peak learning rate is given twice, as optimizer.params.{key} {params[key]} and as "
            f"{owner} {schedule.peak}; leave optimizer.params.{key} out."
            for key in ("lr", "adam_lr")
            if is_number(params.get(key)) and params[key] != schedule.peak
        ]
    return problems


def offloads_optimizer(ds: dict[str, Any]) -> bool:
    """Whether the optimizer's states and its step are the host's; DeepSpeed does the same under every device that it
    offloads to with ZeRO-1 and ZeRO-2."""
    zero = section_of(ds, "zero_optimization")
    return bool(zero.get("cpu_offload")) or section_of(zero, "offload_optimizer").get("device", "none") != "none"


def optimizer_of(ds: dict[str, Any]) -> OptimizerSpec | None:
    """The optimizer that a DeepSpeed JSON asks for; None where megamoe knows none of that name."""
    return find_optimizer(section_of(ds, "optimizer").get("type"))


def operator_builder(ds: dict[str, Any]) -> str | None:
    """Name of DeepSpeed's builder for the operator that it compiles for the optimizer; None where it takes torch's."""
    spec, params = optimizer_of(ds), section_of(section_of(ds, "optimizer"), "params")
    if not spec or not spec.builders or params.get("torch_adam"):
        return None
    return spec.builders[offloads_optimizer(ds)]


def _optimizer_problems(ds: dict[str, Any], where: str, on_cpu: bool) -> list[str]:
    problems = []
    section = section_of(ds, "optimizer")
    kind, spec, params = section.get("type"), optimizer_of(ds), section_of(section, "params")
    if section.get("params", {}) != params:
        problems.append(f'{where}: "optimizer.params" is {shown(section["params"])}; give an object of settings.')
    if "optimizer" not in ds or (ds["optimizer"] == section and kind is None):
        key = '"optimizer.type"' if "optimizer" in ds else '"optimizer"'
        problems.append(f'{where}: {key} is missing; give "optimizer": {{"type": "AdamW", "params": {{...}}}}.')
    elif kind is not None and kind not in optimizer_names():
        problems.append(f"{where}: optimizer.type is {shown(kind)}; use one of {', '.join(optimizer_names())}.")
    problems += _params_problems(spec, str(kind), params, where)
    if spec and spec.offloaded_on_cpu and on_cpu and not offloads_optimizer(ds):
        problems.append(
            f"{where}: optimizer.type is {shown(kind)}, which DeepSpeed runs on CPU only with its states "
            'offloaded; add "offload_optimizer": {"device": "cpu"} to zero_optimization, or use "AdamW".'
        )
    if spec and spec.splits_matrices:
        problems += _muon_problems(ds, str(kind), params, where)
    betas = params.get("betas", [0.9, 0.999])
    fits = isinstance(betas, list) and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    if not fits or len(betas) != 2:
        problems.append(
            f"{where}: optimizer.params.betas is {shown(betas)}{why(betas)}; give two numbers from 0 to below 1."
        )
    clipping = ds.get("gradient_clipping", 1.0)
    if not is_number(clipping) or clipping < 0:
        problems.append(
            f"{where}: gradient_clipping is {shown(clipping)}{why(clipping)}; give a norm above 0, or 0 for none."
        )
    dtype = section_of(ds, "data_types").get("grad_accum_dtype")
    if dtype not in (None, "fp32", "bf16", "fp16"):
        problems.append(f'{where}: data_types.grad_accum_dtype is {shown(dtype)}; use "fp32", "bf16" or "fp16".')
    return problems


def _muon_problems(ds: dict[str, Any], kind: str, params: dict[str, Any], where: str) -> list[str]:
    problems = []
    if "muon_lr" not in params:
        problems.append(
            f"{where}: optimizer.params.muon_lr is missing; give the peak learning rate of the matrices, such as 0.02: "
            "the scheduler has that of the other parameters, which AdamW takes."
        )
    elif not ABOVE_0.fits(params["muon_lr"]):
        rate = params["muon_lr"]
        problems.append(f"{where}: optimizer.params.muon_lr is {shown(rate)}{why(rate)}; give {ABOVE_0.words}.")
    momentum = params.get("momentum", 0.95)
    if not is_number(momentum) or not 0 <= momentum < 1:
        problems.append(
            f"{where}: optimizer.params.momentum is {shown(momentum)}{why(momentum)}; give a number from 0 to below 1."
        )
    if offloads_optimizer(ds):
        problems.append(
            f"{where}: optimizer.type is {shown(kind)}, whose products of matrices an offloaded step would leave to "
            'the host\'s cores; leave "offload_optimizer" out of zero_optimization, or use "AdamW".'
        )
    return problems


def _params_problems(spec: OptimizerSpec | None, kind: str, params: dict[str, Any], where: str) -> list[str]:
    """Settings that the optimizer does not take, or, where it is unknown, that none takes, and values of the wrong
    kind."""
    problems = []
    kinds = {key: kind for kind, keys in OPTIMIZER_PARAMS.items() for key in keys.split()}
    known = spec.params if spec else optimizer_params()
    unsaved = spec.unsaved_if if spec else unsaved_params()
    for key, value in params.items():
        if key in unsaved and value:
            problems.append(
                f"{where}: optimizer.params.{key} is {shown(value)}, which adds a state that is not saved; leave "
                "it out."
            )
        elif key not in known and key in optimizer_params():
            problems.append(
                f"{where}: optimizer.params.{key} is {shown(value)}, which {kind} does not take; leave it out."
            )
        elif key not in known:
            problems.append(unknown_key(f"{where}: optimizer.params", key, known))
        elif key in kinds:
            problems += value_problems(kinds[key], f"optimizer.params.{key}", value, where)
    return problems


def section_of(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; empty where there is none or it is no object, which is reported elsewhere."""
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def _zero_problems(ds: dict[str, Any], where: str) -> list[str]:
    zero = section_of(ds, "zero_optimization")
    if ds.get("zero_optimization", {}) != zero:
        return []  # reported as no object
    stage = zero.get("stage", 0)
    if stage not in (1, 2) or isinstance(stage, bool):
        reason = "DeepSpeed refuses ZeRO-3 with its MoE layer" if stage == 3 else "megamoe trains with ZeRO-1 or ZeRO-2"
        return [f"{where}: zero_optimization.stage is {shown(stage)}; {reason}: set it to 1 or 2."]
    problems = [
        f"{where}: zero_optimization.{key} is false, but ZeRO-2 with experts needs it; set it to true."
        for key in ("contiguous_gradients", "reduce_scatter")
        if stage == 2 and zero.get(key) is False
    ]
    problems += [
        f"{where}: zero_optimization.{key} is {shown(zero[key])}, but then a checkpoint does not say which values "
        "are whose, and could not be resumed on other ranks; leave it out."
        for key in ("round_robin_gradients", "elastic_checkpoint")
        if zero.get(key)
    ]
    mixed = dtype_of(ds) == "bf16" and section_of(ds, "data_types").get("grad_accum_dtype") == "fp32"
    if stage == 1 and mixed and not offloads_optimizer(ds):
        problems.append(
            f'{where}: zero_optimization.stage is 1 with bf16 and data_types.grad_accum_dtype "fp32", where DeepSpeed '
            "takes an optimizer whose checkpoints cannot be resharded for other ranks; use stage 2, or leave "
            "grad_accum_dtype out."
        )
    return problems


def _precision_problems(ds: dict[str, Any], where: str, on_cpu: bool) -> list[str]:
    fp16, bf16 = section_of(ds, "fp16"), section_of(ds, "bf16")
    problems = [
        f"{where}: {name}.enabled is {shown(section['enabled'])}{why(section['enabled'])}; set it to {values}."
        for name, section, values in (("bf16", bf16, 'true, false or "auto"'), ("fp16", fp16, "true or false"))
        if not isinstance(section.get("enabled", False), bool) and (name, section["enabled"]) != ("bf16", "auto")
    ]
    if fp16.get("enabled") is True and bf16.get("enabled") in (True, "auto"):
        return [*problems, f"{where}: the precision is given twice, bf16 and fp16 are both enabled; disable one."]
    scale = fp16.get("loss_scale")
    if scale is not None and not (is_number(scale) and (scale >= 0 or on_cpu)):
        problems.append(
            f"{where}: fp16.loss_scale is {shown(scale)}{why(scale)}; give a number above 0, or 0 for one that adapts."
        )
    elif fp16.get("enabled") and on_cpu and not (scale and scale > 0):
        problems.append(
            f"{where}: fp16 on CPU has no loss scale (fp16.loss_scale is {shown(scale)}); "
            "give a number above 0 there, or use bf16."
        )
    return problems
