"""Restore a training engine, or start one from weights alone, on any number of ranks with any ep_size.

Every rank reads its own slices of masters and optimizer state, whatever the ranks and ep_size of the run that saved
them, while the ranks together verify the checkpoint's bytes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint import manifest
from megamoe.checkpoint.reader import Source, load_buffers, open_source
from megamoe.errors import UserError
from megamoe.model.names import plain_name
from megamoe.optimizers import MASTERS, StateTensor, find_optimizer


def restore_first_verified(
    engine: deepspeed.DeepSpeedEngine, checkpoints: list[Path], weights_only: bool = False
) -> Path | None:
    """Restore the first of `checkpoints`, as rank 0 has them, that is verified, and return it; None if there are
    none.

    Collective. The ranks share the verification, which runs while they read; rank 0 prints which checkpoints were
    passed over. Raises UserError, on every rank, if all are damaged.

    Args:
        weights_only: leave all but weights and router statistics as they are.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared = [checkpoints]
    dist.broadcast_object_list(shared)
    found: list[str] = []
    for checkpoint in shared[0]:
        with ThreadPoolExecutor(1) as executor:
            verification = executor.submit(manifest.problems, checkpoint, rank, world_size)
            unreadable = _read_checkpoint(engine, checkpoint, weights_only)
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, (verification.result(), unreadable))
        damaged, stumbled = (list(dict.fromkeys(p for part in parts for p in part[kind])) for kind in (0, 1))
        if stumbled and not damaged:  # every byte is what was saved, so an older one would fare no better
            raise UserError(*stumbled)
        found = damaged
        if not found:
            engine.optimizer.update_lp_params()
            return checkpoint
        if rank == 0 and len(shared[0]) > 1:
            print(manifest.passed_over(checkpoint, found), flush=True)
    if found:
        raise UserError(*found)
    return None


def _read_checkpoint(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, weights_only: bool) -> list[str]:
    """Returns why it cannot be read, if so; then the engine's state is of no use. Raises nothing: the other ranks wait
    to hear of it."""
    try:
        _read_state(engine, open_source(checkpoint), weights_only)
    except UserError as error:
        return error.problems
    except Exception as error:  # damaged files fail in any way
        return [f"{checkpoint} cannot be read ({error!r}); use an older checkpoint."]
    return []


def _read_state(engine: deepspeed.DeepSpeedEngine, source: Source, weights_only: bool) -> None:
    """Read this rank's slices of masters and optimizer state, whatever the ranks and ep_size of the run that saved
    them."""
    zero = engine.optimizer
    training = {} if weights_only else source.training_state()
    tensors = [] if weights_only else _state_tensors(engine.optimizer_name(), source, training)
    first_expert = engine.module.topology.first_expert
    names = {parameter: plain_name(name, first_expert) for name, parameter in engine.module.named_parameters()}
    state: dict[int, dict[str, Any]] = {}
    for group, master in enumerate(zero.single_partition_of_fp32_groups):
        state[group] = {one.name: torch.zeros_like(master.data, dtype=one.dtype) for one in tensors}
        for kind, flat in {MASTERS: master.data, **state[group]}.items():  # one after the other, as they lie in files
            for parameter in zero.bit16_groups[group]:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else its values are on other ranks
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    values = source.read(names[parameter], kind, there.start, there.numel)
                    flat[here.start : here.start + here.numel].copy_(values)
        step = training.get("optimizer_step")
        if step is not None:  # each group counts its own
            state[group]["step"] = step.clone() if isinstance(step, Tensor) else step
    load_buffers(engine.module, source)
    if tensors:
        zero.optimizer.load_state_dict({**zero.optimizer.state_dict(), "state": state})
        zero._link_all_hp_params()
    if training:
        _restore_training_state(engine, training)


def _state_tensors(optimizer: str, source: Source, training: dict[str, Any]) -> list[StateTensor]:
    """The optimizer's state tensors, which `source` holds; none where no step had been applied. Raises UserError."""
    if not source.state_names:
        return []
    spec = find_optimizer(optimizer)
    assert spec, "the checks of a run refuse what is not in the table"
    if spec.counts_steps and training["optimizer_step"] is None:
        raise UserError(f"the checkpoint holds the state of {optimizer} without its step count; use an older one.")
    if spec.whole:
        raise UserError(
            f"{optimizer} keeps {', '.join(spec.whole)} of whole parameters, which cannot be restored yet; start with "
            "--init_from, or use another optimizer."
        )
    for tensor in spec.state:
        if tensor.name not in source.state_names:
            raise UserError(
                f"the checkpoint holds no {tensor.name}, which {optimizer} needs, but {', '.join(source.state_names)}; "
                "resume with the optimizer that saved it."
            )
    return list(spec.state)


def _restore_training_state(engine: deepspeed.DeepSpeedEngine, training: dict[str, Any]) -> None:
    engine.global_steps = training["global_steps"]
    engine.global_samples = training["global_samples"]
    engine.skipped_steps = training["skipped_steps"]
    engine.optimizer.loss_scaler = training["loss_scaler"]
    # The rates of the optimizer's groups follow from the step; DeepSpeed's groups are others at another ep_size.
    scheduler = engine.lr_scheduler
    counts = {key: training["lr_scheduler"][key] for key in ("last_epoch", "_step_count")}
    scheduler.load_state_dict({**scheduler.state_dict(), **counts})
    for group, base, share in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * share(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
