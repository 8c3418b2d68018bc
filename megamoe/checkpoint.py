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
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from megamoe import manifest
from megamoe.config import UserError
from megamoe.manifest import FileRecord
from megamoe.names import plain_name
from megamoe.reader import KINDS, Source, load_buffers

SCRIPT = "zero_to_fp32.py"
SLACK_BYTES = 4096  # a tensor whose storage is larger by more than this is copied before it is written


class _Collector(CheckpointEngine):
    """Where DeepSpeed hands its files when they are not to be written yet."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def create(self, info: Any) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError

    def commit(self, info: Any) -> None: ...

    def preserves_storage_sharing(self) -> bool:
        return False  # or DeepSpeed would copy every tensor first


def engine_files(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What DeepSpeed would write on this rank, by file name; the tensors are the engine's own."""
    collector = _Collector()
    writer, engine.checkpoint_engine = engine.checkpoint_engine, collector
    try:
        engine._save_moe_checkpoint("", "")
    finally:
        engine.checkpoint_engine = writer
    optimizer = {
        "optimizer_state_dict": engine.optimizer.state_dict(),
        "ds_config": engine.config,
        "ds_version": deepspeed.__version__,
    }
    return {**collector.files, Path(engine._get_zero_ckpt_name("", "")).name: optimizer}


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
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return copied


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the host, without the rest of the buffer that it is a part of: torch.save writes whole storages."""
    tensor = tensor.cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes + SLACK_BYTES else tensor


class CheckpointWriter:
    """Saves an engine into RUN/checkpoints, one checkpoint at a time. Every rank calls the same methods in order."""

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
        self._records: dict[str, FileRecord] = {}
        self._error: Exception | None = None
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
        files = engine_files(self.engine)
        copied = self._host_copy.take(files) if self._host_copy and not hold else None
        self._thread = threading.Thread(
            target=self._write, args=(copied or files, manifest.partial_of(self._checkpoint))
        )
        self._thread.start()
        if copied is None:  # the thread reads what the next step changes
            self._thread.join()
        self._waited = time.perf_counter() - self._started

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

    def _write(self, files: dict[str, Any], partial: Path) -> None:
        """On this rank's thread: every file, and on rank 0 what lies beside them."""
        try:
            partial.mkdir(parents=True, exist_ok=True)
            for name, state in files.items():
                compact = _map_tensors(state, _own_storage)
                self._records[name] = manifest.write_hashed(partial / name, functools.partial(torch.save, compact))
            if self.rank == 0:
                script = Path(__file__).with_name(SCRIPT).read_bytes()
                run = json.dumps(self.record, indent=2).encode()
                for name, data in ((SCRIPT, script), ("run.json", run)):
                    self._records[name] = manifest.write_file(partial / name, data)
        except Exception as error:  # of whatever kind: a thread's own would be seen by nobody
            self._error = error

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


def first_that_holds(checkpoints: list[Path]) -> Path | None:
    """The first of `checkpoints`, as rank 0 has them, of which every byte is what was saved; None if there are none.

    Collective; the ranks share the reading, and rank 0 says which were passed over. Raises UserError, on every rank,
    if none holds.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared = [checkpoints]
    dist.broadcast_object_list(shared)
    found: list[str] = []
    for checkpoint in shared[0]:
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, manifest.problems(checkpoint, rank, world_size))
        found = list(dict.fromkeys(problem for part in parts for problem in part))
        if not found:
            return checkpoint
        if rank == 0 and len(shared[0]) > 1:
            print(manifest.passed_over(checkpoint, found), flush=True)
    if found:
        raise UserError(*found)
    return None


def restore(engine: deepspeed.DeepSpeedEngine, source: Source, first_expert: int, weights_only: bool = False) -> None:
    """Give an engine the weights in `source`, the optimizer's state, counters and schedule.

    Collective. Every rank reads its own slices, whatever the ranks and ep_size of the run that saved them.

    Args:
        first_expert: id of this rank's first expert.
        weights_only: leave all but weights and router statistics as they are.
    """
    zero = engine.optimizer
    kinds = KINDS[:1] if weights_only else KINDS
    training = {} if weights_only else source.training_state()
    names = {parameter: plain_name(name, first_expert) for name, parameter in engine.module.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            state[group] = {kind: torch.zeros_like(master) for kind in kinds[1:]}
            flat = {"fp32": master.data, **state[group]}
            for parameter in zero.bit16_groups[group]:
                mapping = parameter._hp_mapping
                if mapping is None:  # its values are on other ranks
                    continue
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                for kind in kinds:
                    values = source.read(names[parameter], kind, there.start, there.numel)
                    flat[kind][here.start : here.start + here.numel].copy_(values)
            if training:
                step = training["adam_step"]
                state[group]["step"] = step.clone() if isinstance(step, Tensor) else step  # each group counts its own
    load_buffers(engine.module, source)
    if training:
        zero.optimizer.load_state_dict({**zero.optimizer.state_dict(), "state": state})
        zero._link_all_hp_params()
        _restore_training_state(engine, training)
    zero.update_lp_params()


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
