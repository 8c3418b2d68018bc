"""Save a training engine without holding it up, and restore it on any number of ranks with any ep_size.

What is written is DeepSpeed's own format, so its loader reads it at the same topology. The way it is written is not:
a copy in host memory, files by a thread of each rank, then one rename for all (see manifest.py).
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from megamoe import manifest
from megamoe.config import UserError
from megamoe.manifest import FileRecord
from megamoe.names import plain_name
from megamoe.reader import KINDS, Source, load_buffers, open_source

SCRIPT = "zero_to_fp32.py"
SLACK_BYTES = 4096  # a tensor whose storage is larger by more than this is copied before it is written


def engine_files(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What DeepSpeed would write on this rank, by file name; the tensors are the engine's own, where DeepSpeed copies
    every expert first (`DeepSpeedEngine._save_moe_checkpoint`)."""
    files: dict[str, Any] = {}
    for layer, moe in enumerate(engine.module.moe_layers()):
        if groups._get_expert_data_parallel_rank(moe.expert_group_name) == 0:
            first_expert = groups._get_expert_parallel_rank(moe.expert_group_name) * moe.num_local_experts
            for expert_id, expert in enumerate(moe.local_experts, start=first_expert):
                path = engine._get_expert_ckpt_name("", layer, expert_id, "", checkpoint_mp_rank=0)
                prefix = f"layers.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{expert_id}."
                files[Path(path).name] = {prefix + name: weight for name, weight in expert.state_dict().items()}
    if dist.get_rank() == 0:
        weights = engine._get_non_moe_state_dict(engine.module.state_dict())
        partitioned = engine.zero_optimization_partition_gradients()
        common = engine._common_checkpoint_state(weights, zero_optimizer_state=True, save_frozen_param=partitioned)
        files[Path(engine._get_ckpt_name("", "")).name] = {**common, "num_experts": engine.num_experts}
    files[Path(engine._get_zero_ckpt_name("", "")).name] = {
        "optimizer_state_dict": engine.optimizer.state_dict(),
        "ds_config": engine.config,
        "ds_version": deepspeed.__version__,
    }
    return files


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `value` with every tensor in its dicts, lists and tuples replaced."""
    if isinstance(value, Tensor):
        return function(value.detach())
    if isinstance(value, dict):
        return type(value)((key, _map_tensors(inner, function)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(inner, function) for inner in value)
    return copy.deepcopy(value)


class HostCopy:
    """Room in host memory for one state, kept from save to save: fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, state: Any) -> Any | None:
        """A copy of `state`; None if this host has no room for it. The next call overwrites it."""
        tensors: list[Tensor] = []
        _map_tensors(state, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        if [(t.shape, t.dtype) for t in tensors] != [(b.shape, b.dtype) for b in self._buffers]:
            self._buffers = []
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            if sum(tensor.nbytes for tensor in tensors) * ranks_here > psutil.virtual_memory().available:
                return None
            self._buffers = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
        buffers = iter(self._buffers)
        copied = _map_tensors(state, lambda tensor: next(buffers).copy_(tensor, non_blocking=True))
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return copied


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the host, without the rest of the buffer that it is a part of: torch.save writes whole storages."""
    tensor = tensor.cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes + SLACK_BYTES else tensor


class CheckpointWriter:
    """Saves an engine into RUN/checkpoints, one checkpoint at a time. Every rank calls the same methods in order.

    What is saved changes in the optimizer's step alone. So a thread copies it while the next forward and backward
    passes run, and `before_update` waits for the copy; then the thread writes the copy while training goes on.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        folder: Path,
        record: dict[str, Any],
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        background: bool = True,
    ):
        """
        Args:
            record: of the run; goes into every checkpoint as run.json.
            keep_last: newest checkpoints that stay; 0 keeps all.
            keep_every: multiples of so many steps stay too.
            background: copy the state and write while training goes on, if the host has room for the copy.
        """
        self.engine = engine
        self.folder = folder
        self.record = record
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.rank = dist.get_rank()
        self._host_copy = HostCopy() if background else None
        self._checkpoint: Path | None = None  # that is being written
        self._thread: threading.Thread | None = None
        self._read = threading.Event()  # set once the thread needs the engine's own tensors no more
        self._read.set()
        self._records: dict[str, FileRecord] = {}
        self._error: Exception | None = None
        self._started = self._waited = 0.0
        if self.rank == 0:
            manifest.clean(folder)
        dist.barrier()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is begun and not completed; the same on every rank."""
        return self._checkpoint is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, hold: bool = False) -> None:
        """Begin to save; `complete` ends it. Waits for the one before, if that is not complete.

        Args:
            hold: nothing is trained until it is complete, so that no copy is needed.
        """
        self._started = time.perf_counter()
        if self.pending:
            self.complete()
        self._checkpoint = self.folder / f"step_{step}"
        self._records, self._error = {}, None
        self._read.clear()
        host_copy = None if hold else self._host_copy
        work = (engine_files(self.engine), manifest.partial_of(self._checkpoint), host_copy)
        self._thread = threading.Thread(target=self._work, args=work)
        self._thread.start()
        self._waited = time.perf_counter() - self._started

    def before_update(self) -> None:
        """Call ahead of every optimizer step: waits until the state that is being saved may change."""
        start = time.perf_counter()
        self._read.wait()
        self._waited += time.perf_counter() - start

    def complete(self) -> bool:
        """Wait for every rank's files, then make them a checkpoint. Returns whether it was saved; if not, the older
        ones are as they were, and rank 0 has said why."""
        assert self._checkpoint
        assert self._thread
        waiting = time.perf_counter()
        self._thread.join()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self._records, str(self._error or "")))
        failure = next((error for _, error in parts if error), "")
        if self.rank == 0:
            files = {name: record for records, _ in parts for name, record in records.items()}
            failure = failure or self._commit(files)
            self._waited += time.perf_counter() - waiting
            self._report(failure, manifest.total_bytes(files.values()))
        outcome = [failure]
        dist.broadcast_object_list(outcome)
        self._checkpoint = self._thread = None
        return not outcome[0]

    def _work(self, files: dict[str, Any], partial: Path, host_copy: HostCopy | None) -> None:
        """The thread."""
        try:
            copied = host_copy.take(files) if host_copy else None
            if copied is not None:
                self._read.set()
            self._write(files if copied is None else copied, partial)
        except Exception as error:  # of whatever kind: a thread's own would be seen by nobody
            self._error = error
        finally:
            self._read.set()

    def _write(self, files: dict[str, Any], partial: Path) -> None:
        """Every file of this rank, and on rank 0 what lies beside them."""
        partial.mkdir(parents=True, exist_ok=True)
        for name, state in files.items():
            compact = _map_tensors(state, _own_storage)
            self._records[name] = manifest.write_hashed(partial / name, functools.partial(torch.save, compact))
        if self.rank == 0:
            script = Path(__file__).with_name(SCRIPT).read_bytes()
            run = json.dumps(self.record, indent=2).encode()
            for name, data in ((SCRIPT, script), ("run.json", run)):
                self._records[name] = manifest.write_file(partial / name, data)

    def _commit(self, files: dict[str, FileRecord]) -> str:
        """Returns why it failed, or nothing."""
        assert self._checkpoint
        try:
            about = {key: self.record[key] for key in ("world_size", "ep_size")}
            manifest.commit(self._checkpoint, {"step": manifest.step_of(self._checkpoint), **about}, files)
            manifest.prune(self._checkpoint, self.keep_last, self.keep_every)
        except OSError as error:
            return str(error)
        return ""

    def _report(self, failure: str, size: int) -> None:
        assert self._checkpoint
        if not failure:
            seconds = time.perf_counter() - self._started
            print(
                f"saved {self._checkpoint}: {size / 1e9:.3f} GB in {seconds:.1f} s, of which training waited "
                f"{self._waited:.2f} s",
                flush=True,
            )
            return
        manifest.clean(self.folder)
        older = next(iter(manifest.candidates(self.folder)), None)
        print(
            f"error: {self._checkpoint} was NOT saved ({failure}); "
            + (f"{older} is still the newest checkpoint" if older else "there is no older checkpoint")
            + "; make room there, or give --keep_last.",
            file=sys.stderr,
            flush=True,
        )


# --- restoring ------------------------------------------------------------------------------------------------------


def restore_first_that_holds(
    engine: deepspeed.DeepSpeedEngine, checkpoints: list[Path], first_expert: int, weights_only: bool = False
) -> Path | None:
    """Restore the first of `checkpoints`, as rank 0 has them, of which every byte is what was saved; returns it, or
    None if there are none.

    Collective. The ranks share the verification, which goes on beside the reading; rank 0 says what was passed over.
    Raises UserError, on every rank, if none holds.

    Args:
        first_expert: id of this rank's first expert.
        weights_only: leave all but weights and router statistics as they are.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared = [checkpoints]
    dist.broadcast_object_list(shared)
    found: list[str] = []
    for checkpoint in shared[0]:
        with ThreadPoolExecutor(1) as beside:
            verification = beside.submit(manifest.problems, checkpoint, rank, world_size)
            unreadable = _read_checkpoint(engine, checkpoint, first_expert, weights_only)
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, (verification.result(), unreadable))
        # Where verification finds damage, that is why reading stumbled.
        damaged, stumbled = ([problem for part in parts for problem in part[kind]] for kind in (0, 1))
        found = list(dict.fromkeys(damaged or stumbled))
        if not found:
            engine.optimizer.update_lp_params()
            return checkpoint
        if rank == 0 and len(shared[0]) > 1:
            print(manifest.passed_over(checkpoint, found), flush=True)
    if found:
        raise UserError(*found)
    return None


def _read_checkpoint(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Path, first_expert: int, weights_only: bool
) -> list[str]:
    """Returns why it cannot be read, if so; then the engine's state is of no use."""
    try:
        _read_state(engine, open_source(checkpoint), first_expert, weights_only)
    except UserError as error:
        return error.problems
    except Exception as error:  # damaged files fail in any way, and the other ranks must hear of it
        return [f"{checkpoint} cannot be read ({error!r}); use an older checkpoint."]
    return []


def _read_state(engine: deepspeed.DeepSpeedEngine, source: Source, first_expert: int, weights_only: bool) -> None:
    """Read this rank's slices of masters and moments, whatever the ranks and ep_size of the run that saved them."""
    zero = engine.optimizer
    kinds = KINDS[:1] if weights_only else KINDS
    training = {} if weights_only else source.training_state()
    names = {parameter: plain_name(name, first_expert) for name, parameter in engine.module.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for group, master in enumerate(zero.single_partition_of_fp32_groups):
        flat = {kind: master.data if kind == "fp32" else torch.zeros_like(master.data) for kind in kinds}
        for kind in kinds:  # one after the other, as they lie in the files
            for parameter in zero.bit16_groups[group]:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else its values are on other ranks
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    values = source.read(names[parameter], kind, there.start, there.numel)
                    flat[kind][here.start : here.start + here.numel].copy_(values)
        if training:
            step = training["adam_step"]  # each group counts its own
            moments = {kind: flat[kind] for kind in kinds if kind != "fp32"}
            state[group] = {**moments, "step": step.clone() if isinstance(step, Tensor) else step}
    load_buffers(engine.module, source)
    if training:
        zero.optimizer.load_state_dict({**zero.optimizer.state_dict(), "state": state})
        zero._link_all_hp_params()
        _restore_training_state(engine, training)


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
