"""Parameter groups and the only `deepspeed.initialize`."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops.lion import DeepSpeedCPULion
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from pydantic import ValidationError
from torch import nn

from megamoe.config.recipe import DTYPES, Recipe
from megamoe.launch import cpu
from megamoe.model.names import is_projection, is_undecayed, plain_parts
from megamoe.training.matrix_share import MatrixShare, place_of
from megamoe.training.muon import Muon
from megamoe.training.operators import load_operator
from megamoe.training.reduce_once import ReduceOnceOptimizer
from megamoe.training.schedule import learning_rate
from megamoe.training.zero_step import GivenNormOptimizer, GuardedOptimizer


def parameter_groups(model: nn.Module, muon: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Optimizer groups: norms, biases and latents without weight decay, the rest with, each split for DeepSpeed into
    shared and expert parameters.

    Args:
        muon: settings of a further group of those that Muon takes, the matrices of the blocks; None for no such group.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        by_muon = muon is not None and is_projection(name)
        (matrices if by_muon else undecayed if is_undecayed(name) else decayed).append(parameter)
    matrices.sort(key=lambda one: place_of(one.shape) if one.dim() == 2 else ())  # stacked experts stay in order
    groups = split_params_into_different_moe_groups_for_optimizer(
        [
            {"name": "decayed", "params": decayed},
            {"name": "undecayed", "params": undecayed, "weight_decay": 0.0},
            {"name": "matrices", "params": matrices, **(muon or {})},
        ]
    )
    return [group for group in groups if group["params"]]  # DeepSpeed leaves one empty before a too large parameter


def build_engine(model: nn.Module, recipe: Recipe) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` in DeepSpeed's engine. After N optimizer steps its learning rate is `learning_rate(N)`."""
    ds, schedule = recipe.json_for_deepspeed(), recipe.schedule
    del ds["scheduler"]  # DeepSpeed's lags by a step
    ds.pop("comms_logger", None)  # it would wait for each collective, and sees its own alone
    ds.setdefault("steps_per_print", None)  # megamoe's own lines say it
    ds.setdefault("timers", {"throughput": {"enabled": False}})  # it would wait for the device twice per micro-batch
    if recipe.reduces_once:
        ds.pop("data_types", None)  # with sums in fp32 under bf16 its ZeRO-1 is not its ZeRO optimizer
    # The group's learning rate is the peak; LambdaLR multiplies it by the schedule's share.
    ds["optimizer"].setdefault("params", {})["lr"] = schedule.peak

    def share_of_peak(step: int) -> float:
        return learning_rate(step, **vars(schedule)) / schedule.peak

    load_operator(recipe.operator_builder)
    muon = _take_muon(model, ds, recipe) if recipe.optimizer.splits_matrices else None
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=None if muon else parameter_groups(model),
        optimizer=muon,
        config=ds,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak),
    )
    # The engine takes no class for it.
    zero = engine.optimizer
    if recipe.reduces_once:
        ReduceOnceOptimizer.take(zero, DTYPES[recipe.sum_dtype])
    else:
        zero.__class__ = GuardedOptimizer if zero.cpu_offload else GivenNormOptimizer
    zero.loss_scaler.raise_error_at_min_scale = False  # `skipped.py` ends such a run in a sentence
    if isinstance(zero.optimizer, DeepSpeedCPULion):
        _make_one_moment(zero.optimizer)
    if muon:
        _share_matrices(muon, zero, model)
    if engine.device.type == "cpu":
        cpu.give_back_freed_memory()
    return engine


def _take_muon(model: nn.Module, ds: dict[str, Any], recipe: Recipe) -> Muon:
    """The optimizer; `ds` no longer asks DeepSpeed for one.

    DeepSpeed's own Muon takes stacked experts for one matrix or for none, and orthogonalizes at the end of a backward
    pass: the norm that clips and guards a step would be that of updates. Its momentum has the gradients' precision, and
    a copy on every rank that owns a part of a parameter.
    """
    settings = {key: value for key, value in ds.pop("optimizer")["params"].items() if key != "adam_lr"}
    ds["zero_allow_untested_optimizer"] = True
    groups = parameter_groups(model, {"use_muon": True, "lr": settings.pop("muon_lr")})
    return Muon(groups, dtype=torch.float32 if recipe.dtype == "fp32" else torch.bfloat16, **settings)


def _share_matrices(muon: Muon, zero: DeepSpeedZeroOptimizer, model: nn.Module) -> None:
    """Tell Muon which matrices the flat groups of DeepSpeed hold, each expert's own."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for number, (group, parameters) in enumerate(zip(muon.param_groups, zero.bit16_groups, strict=True)):
        if group["use_muon"]:
            parts = [part for one in parameters for part in plain_parts(names[one], tuple(one.shape))]
            shapes = [(part.shape[0], part.shape[1]) for part in parts]
            ranks = zero.real_dp_process_group[number]
            rank, count = dist.get_rank(ranks), dist.get_world_size(ranks)
            share = MatrixShare(shapes, int(zero.partition_size[number]), rank, count)
            muon.set_share(zero.single_partition_of_fp32_groups[number], share, ranks)


def _make_one_moment(optimizer: DeepSpeedCPULion) -> None:
    """Make Lion's state: DeepSpeed's first step would add a second moment, which nothing reads but memory and
    checkpoints hold."""
    for group in optimizer.param_groups:
        for master in group["params"]:
            optimizer.state[master] = {"step": 0, "exp_avg": torch.zeros_like(master)}


def deepspeed_own_problems(recipe: Recipe) -> list[str]:
    """What DeepSpeed's own configuration classes, or this device, refuse in a DeepSpeed JSON, one sentence each."""
    problems, where = [], recipe.where
    own = recipe.json_for_deepspeed()
    if "train_micro_batch_size_per_gpu" in own:  # without the other ranks DeepSpeed takes their product for wrong
        own.pop("train_batch_size", None)
    try:
        DeepSpeedConfig(own)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            problems.append(f'{where}: DeepSpeed refuses "{key}" as {detail["input"]!r}: {detail["msg"]}; change it.')
    except Exception as error:  # of whatever its code runs into with a value that it does not check
        problems.append(f"{where}: DeepSpeed refuses it: {' '.join(str(error).split())}; change it.")
    if recipe.fp16.enabled and not get_accelerator().is_fp16_supported():
        problems.append(f"{where}: fp16 is enabled, but this device does not support it; use bf16 or fp32.")
    return problems
