"""What of a training engine is saved: this rank's tensors as slices of parameters, and its counters.

Weights in 16 bits are not: they are the fp32 masters, rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint.index import BUFFER, FlatGroup, OptimizerRecord, SchedulerPosition, Stretch, TrainingRecord
from megamoe.config.optimizers import AVERAGE, AVERAGE_DECAY, MASTERS, OptimizerSpec, StateTensor, find_optimizer
from megamoe.model.names import is_buffer, is_projection, plain_name, plain_parts, stretches

PLAIN = (bool, int, float, str, type(None))


def optimizer_spec(engine: deepspeed.DeepSpeedEngine) -> OptimizerSpec:
    """The optimizer's entry in the table, and with it the average of the weights, where the engine keeps one."""
    spec = find_optimizer(engine.optimizer_name())
    assert spec, "the checks of a run refuse what is not in the table"
    averages = AVERAGE_DECAY in engine.optimizer.optimizer.param_groups[0]
    return replace(spec, state=(*spec.state, AVERAGE)) if averages else spec


def state_by_group(engine: deepspeed.DeepSpeedEngine) -> list[list[StateTensor]]:
    """For each group of the optimizer what it keeps of its parameters."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    spec = optimizer_spec(engine)
    return [spec.state_of(is_projection(names[group[0]])) for group in engine.optimizer.bit16_groups]


def rank_state(engine: deepspeed.DeepSpeedEngine) -> list[FlatGroup]:
    """The engine's own masters and optimizer state of this rank, and on rank 0 the router statistics."""
    zero = engine.optimizer
    groups = []
    for master, held, kept in zip(
        zero.single_partition_of_fp32_groups, stretches_by_group(engine), state_by_group(engine), strict=True
    ):
        state = zero.optimizer.state.get(master, {})
        flat = {MASTERS: master.data, **{one.name: state[one.name] for one in kept if one.name in state}}
        groups.append(FlatGroup(flat, held))
    if dist.get_rank() == 0:  # they are the same on every rank
        groups += [
            FlatGroup({BUFFER: one.flatten()}, [Stretch(plain_name(name), tuple(one.shape), 0, one.numel(), 0)])
            for name, one in engine.module.named_buffers()
            if is_buffer(name)
        ]
    return groups


def stretches_by_group(engine: deepspeed.DeepSpeedEngine) -> list[list[Stretch]]:
    """For each group of the optimizer what this rank holds, in the order of its masters."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    first_expert = engine.module.topology.first_expert
    return [
        [one for parameter in group for one in _stretches(names[parameter], parameter, first_expert)]
        for group in engine.optimizer.bit16_groups
    ]


def _stretches(name: str, parameter: Any, first_expert: int) -> Iterator[Stretch]:
    mapping = parameter._hp_mapping
    if mapping is None:  # its values are on other ranks
        return
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    parts = plain_parts(name, tuple(parameter.shape), first_expert)
    for part, start, count in stretches(parts, there.start, there.numel):
        yield Stretch(part.name, part.shape, start, count, here.start + part.start + start - there.start)


def training_record(engine: deepspeed.DeepSpeedEngine, skipped_in_window: int) -> TrainingRecord:
    """The engine's counters."""
    scheduler = engine.lr_scheduler.state_dict()
    return TrainingRecord(
        global_samples=engine.global_samples,
        skipped_steps=engine.skipped_steps,
        skipped_in_window=skipped_in_window,
        scheduler=SchedulerPosition(last_epoch=scheduler["last_epoch"], step_count=scheduler["_step_count"]),
        loss_scaler=_plain(vars(engine.optimizer.loss_scaler)),
    )


def optimizer_record(engine: deepspeed.DeepSpeedEngine) -> OptimizerRecord:
    """The optimizer's step count and hyperparameters."""
    optimizer = engine.optimizer.optimizer
    kept = [optimizer.state.get(one, {}) for one in engine.optimizer.single_partition_of_fp32_groups]
    step = next((state["step"] for state in kept if "step" in state), None)  # with Muon not all groups count
    held = set().union(*kept)  # nothing before the first applied step
    return OptimizerRecord(
        name=engine.optimizer_name(),
        state=[tensor.name for tensor in optimizer_spec(engine).state if tensor.name in held],
        step=step.item() if isinstance(step, Tensor) else step,
        step_dtype=str(step.dtype).removeprefix("torch.") if isinstance(step, Tensor) else None,
        groups=[_plain(group) for group in optimizer.param_groups],
    )


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Those fields that JSON can hold."""
    return {key: value for key, value in fields.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)
