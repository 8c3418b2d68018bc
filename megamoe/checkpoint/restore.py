"""Restore a training engine, or start one from weights alone, on any number of ranks with any ep_size.

Every rank reads its own slices of masters and optimizer state, whatever the ranks and ep_size of the run that saved
them. Of megamoe's own form, rank 0 reads the index for all, and a rank opens the files that hold its slices and no
others; of other forms every rank opens all. The bytes are verified on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint import folders, indexed_files, verify
from megamoe.checkpoint.engine_state import optimizer_spec, state_by_group, stretches_by_group
from megamoe.checkpoint.index import Index, read_index, share_of
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.opening import open_source
from megamoe.checkpoint.slice_file import DamagedError
from megamoe.config.optimizers import AVERAGE, MASTERS
from megamoe.formats.source import Source, load_buffers
from megamoe.utils.errors import Problems, UserError


@dataclass(frozen=True)
class Found:
    """What one rank finds wrong with a checkpoint, in sentences."""

    damage: list[str] = field(default_factory=list)  # bytes that are not those that were saved
    misfit: list[str] = field(default_factory=list)  # with this engine
    trouble: list[str] = field(default_factory=list)  # of a disk or network: it may be over soon


def first_verified(checkpoints: list[Path]) -> Path | None:
    """The first of `checkpoints`, as rank 0 has them, of which every byte is what was saved; None if there are none.

    Collective. The ranks share the work; rank 0 prints which checkpoints were passed over. Raises UserError, on every
    rank, if all are damaged.
    """
    return _first(checkpoints, lambda path: Found(verify.problems(path, dist.get_rank(), dist.get_world_size())))


def restore_first_verified(
    engine: deepspeed.DeepSpeedEngine, checkpoints: list[Path], weights_only: bool = False
) -> Path | None:
    """Restore the first of `checkpoints` as `first_verified` finds it.

    Args:
        weights_only: leave all but weights and router statistics as they are.
    """
    restored = _first(checkpoints, lambda path: _restore(engine, path, weights_only))
    if restored:
        engine.optimizer.update_lp_params()
    return restored


def _first(checkpoints: list[Path], attempt: Callable[[Path], Found]) -> Path | None:
    """The first path, as rank 0 has them, with which no rank's `attempt` finds anything wrong. Raises UserError or
    OSError, the same on every rank."""
    shared = [checkpoints]
    dist.broadcast_object_list(shared)
    damage: list[str] = []
    for checkpoint in shared[0]:
        try:
            found = attempt(checkpoint)
        except OSError as error:
            found = Found(trouble=[_sentence(error, checkpoint)])
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        damage, misfit, trouble = (
            list(dict.fromkeys(sentence for found in everywhere for sentence in getattr(found, kind)))
            for kind in ("damage", "misfit", "trouble")
        )
        if trouble:  # an older one would be the wrong place to go on from
            raise OSError(trouble[0])
        if misfit and not damage:  # every byte is what was saved, so an older one would fare no better
            raise UserError(*misfit)
        if not damage:
            return checkpoint
        if dist.get_rank() == 0 and len(shared[0]) > 1:
            print(folders.passed_over(checkpoint, damage), flush=True)
    Problems(damage).refuse()
    return None


def _sentence(error: OSError, checkpoint: Path) -> str:
    return f"{error.filename or checkpoint} cannot be read now ({error.strerror or error})"


def _restore(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, weights_only: bool) -> Found:
    """With anything found, the engine's state is of no use. Raises nothing before all ranks have the index, or the
    others would wait. Collective."""
    opened = _share_index(checkpoint)
    if isinstance(opened, Found):
        return opened
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if opened is None:
        found = _read(engine, checkpoint, None, weights_only)
        return replace(found, damage=[*found.damage, *verify.problems(checkpoint, rank, world_size)])
    index, buffers = opened
    found = _read(engine, checkpoint, IndexedFiles(checkpoint, index, buffers), weights_only)
    read = set() if weights_only else {tensor.name for tensor in optimizer_spec(engine).state}
    unread = share_of(index.files, rank, world_size, {*index.optimizer.state} - read)
    return replace(found, damage=[*found.damage, *indexed_files.problems(checkpoint, unread)])


def _share_index(checkpoint: Path) -> tuple[Index, dict[str, Tensor]] | Found | None:
    """The index and the router statistics, or what rank 0 finds wrong with them; None where the checkpoint has another
    form. Collective."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            if folders.has_index(checkpoint):
                index = read_index(checkpoint)
                answer = [(index, IndexedFiles(checkpoint, index).buffers)]
        except UserError as error:
            answer = [Found(damage=error.problems)]
        except OSError as error:
            answer = [Found(trouble=[_sentence(error, checkpoint)])]
    dist.broadcast_object_list(answer)
    return answer[0]


def _read(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, source: Source | None, weights_only: bool) -> Found:
    try:
        _read_state(engine, source or open_source(checkpoint), checkpoint, weights_only)
    except DamagedError as error:
        return Found(damage=error.problems)
    except UserError as error:
        return Found(misfit=error.problems)
    except OSError:
        raise
    except Exception as error:  # damaged files of other forms fail in any way
        return Found(misfit=[f"{checkpoint} cannot be read ({error!r}); use an older checkpoint."])
    return Found()


def _read_state(engine: deepspeed.DeepSpeedEngine, source: Source, checkpoint: Path, weights_only: bool) -> None:
    """Read this rank's slices of masters and optimizer state, whatever the ranks and ep_size of the run that saved
    them."""
    zero = engine.optimizer
    training = {} if weights_only else source.training_state()
    step = folders.step_of(checkpoint)
    if training and step is not None and step != training["global_steps"]:
        raise DamagedError(
            f"{checkpoint} holds the state of step {training['global_steps']}, not that of its name; use an older "
            "checkpoint."
        )
    names = [] if weights_only else _state_names(engine, source, training)
    state: dict[int, dict[str, Any]] = {}
    held, kept = stretches_by_group(engine), state_by_group(engine)
    for group, master in enumerate(zero.single_partition_of_fp32_groups):
        held_state = zero.optimizer.state.get(master, {})  # of a run that goes back: a second one may not fit
        state[group] = {
            one.name: held_state[one.name] if one.name in held_state else torch.zeros_like(master.data, dtype=one.dtype)
            for one in kept[group]
            if one.name in names
        }
        for kind, flat in {MASTERS: master.data, **state[group]}.items():  # one after the other, as they lie in files
            for one in held[group]:
                values = source.read(one.name, kind, one.start, one.count)
                flat[one.offset : one.offset + one.count].copy_(values)
        step = training.get("optimizer_step")
        if step is not None:  # each group counts its own
            state[group]["step"] = step.clone() if isinstance(step, Tensor) else step
    load_buffers(engine.module, source)
    if names:
        zero.optimizer.load_state_dict({**zero.optimizer.state_dict(), "state": state})
        zero._link_all_hp_params()
    elif training:
        _forget_state(zero.optimizer)
    if training:
        _restore_training_state(engine, training)


def _forget_state(optimizer: torch.optim.Optimizer) -> None:
    """The state before the first applied step, at which there is no average yet."""
    for state in optimizer.state.values():
        state.pop(AVERAGE.name, None)
        for name, value in state.items():
            state[name] = value.zero_() if isinstance(value, Tensor) else 0


def _state_names(engine: deepspeed.DeepSpeedEngine, source: Source, training: dict[str, Any]) -> list[str]:
    """The optimizer's state tensors that `source` holds; none where no step had been applied. Raises UserError where
    one is missing."""
    if not source.state_names:
        return []
    optimizer = engine.optimizer_name()
    spec = optimizer_spec(engine)
    if spec.counts_steps and training["optimizer_step"] is None:
        raise UserError(f"the checkpoint holds the state of {optimizer} without its step count; use an older one.")
    for tensor in spec.state:
        if tensor.name not in source.state_names and not tensor.begins_late:
            raise UserError(
                f"the checkpoint holds no {tensor.name}, which {optimizer} needs, but {', '.join(source.state_names)}; "
                "resume with the optimizer that saved it."
            )
    return [tensor.name for tensor in spec.state if tensor.name in source.state_names]


def _restore_training_state(engine: deepspeed.DeepSpeedEngine, training: dict[str, Any]) -> None:
    engine.global_steps = training["global_steps"]
    engine.global_samples = training["global_samples"]
    engine.skipped_steps = training["skipped_steps"]
    for name, value in training["loss_scaler"].items():
        setattr(engine.optimizer.loss_scaler, name, value)
    # The rates of the optimizer's groups follow from the step; DeepSpeed's groups are others at another ep_size.
    scheduler = engine.lr_scheduler
    counts = {key: training["lr_scheduler"][key] for key in ("last_epoch", "_step_count")}
    scheduler.load_state_dict({**scheduler.state_dict(), **counts})
    for group, base, share in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * share(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
