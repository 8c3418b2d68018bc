"""Save a training engine without holding it up.

What is written is DeepSpeed's own format, so its loader reads it at the same topology. The way it is written is not:
a copy in host memory, files by a thread of each rank, then one rename for all (see manifest.py).
"""

from __future__ import annotations

import contextlib
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
from torch import Tensor

from megamoe.checkpoint import manifest
from megamoe.checkpoint.manifest import FileRecord
from megamoe.model.names import engine_name, experts_prefix
from megamoe.optimizers import find_optimizer

SCRIPT = "zero_to_fp32.py"
MEMORY_FACTOR = 1.25  # available memory over what the copies of a host's ranks take, at least
SLACK_BYTES = 4096  # a tensor whose storage is larger by more than this is copied before it is written


POLL_SECONDS = 0.1
SLOW_DISK_BYTES_PER_SECOND = 100e6


def engine_files(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What DeepSpeed would write on this rank, by file name; the tensors are the engine's own, where DeepSpeed copies
    every expert first (`DeepSpeedEngine._save_moe_checkpoint`)."""
    files: dict[str, Any] = {}
    topology = engine.module.topology
    if topology.replica == 0:
        for layer, moe in enumerate(engine.module.moe_layers()):
            for expert_id, expert in zip(topology.expert_ids, moe.local_experts, strict=True):
                path = engine._get_expert_ckpt_name("", layer, expert_id, "", checkpoint_mp_rank=0)
                prefix = f"{experts_prefix(layer)}.{expert_id}."
                files[Path(path).name] = {
                    engine_name(prefix + name): weight for name, weight in expert.state_dict().items()
                }
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
    """Host memory for one state, kept from save to save: new memory costs more than the copying."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, state: Any) -> Any | None:
        """A copy of `state`; None if this host has too little memory for it. The next call overwrites it."""
        tensors: list[Tensor] = []
        _map_tensors(state, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        if [(t.shape, t.dtype) for t in tensors] != [(b.shape, b.dtype) for b in self._buffers]:
            self._buffers = []
            ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size()
            needed = sum(tensor.nbytes for tensor in tensors) * int(ranks_here)
            if needed * MEMORY_FACTOR > available_memory():
                return None
            try:
                self._buffers = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
            except RuntimeError:  # memory that is free need not be free to be pinned
                return None
        buffers = iter(self._buffers)
        on_gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        side = torch.cuda.Stream(on_gpu) if on_gpu else None  # parallel to the forward pass, not queued behind it
        if side:
            side.wait_stream(torch.cuda.current_stream(on_gpu))
        with torch.cuda.stream(side):
            copied = _map_tensors(state, lambda tensor: next(buffers).copy_(tensor, non_blocking=tensor.is_cuda))
        if side:
            side.synchronize()
        return copied


def available_memory() -> int:
    """Bytes that this process could still take: of the host, and of the control groups that it is in."""
    available = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        folder = root / line.split(":", 2)[2].lstrip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit there
                used = int((group / "memory.current").read_text())
                available = min(available, int((group / "memory.max").read_text()) - used)
    return available


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor without the rest of the buffer that it is a part of: torch.save writes complete storages."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes + SLACK_BYTES else tensor


class CheckpointWriter:
    """Saves an engine into RUN/checkpoints, one checkpoint at a time. Every rank calls the same methods in order.

    What is saved changes in the optimizer's step alone. So a thread copies it while the next forward and backward
    passes run, and `before_update` waits for the copy; then the thread writes the copy while training continues.
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
        first: int = 0,
        waiting: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            waiting: called repeatedly while training waits for files, so that the rank does not count as stalled.
            record: of the run; goes into every checkpoint as run.json.
            keep_last: newest checkpoints that stay; 0 keeps all.
            keep_every: checkpoints at multiples of this many steps stay too.
            background: copy the state and write while training continues, if the host has memory for the copy.
            first: step that the run resumes from.
        """
        self.engine = engine
        self.folder = folder
        self.record = record
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.rank = dist.get_rank()
        self._waiting = waiting
        self._host_copy = HostCopy() if background else None
        self._checkpoint: Path | None = None  # that is being written
        self._thread: threading.Thread | None = None
        self._engine_is_free = threading.Event()  # set while the thread does not read the engine's own tensors
        self._engine_is_free.set()
        self._removal: threading.Thread | None = None  # of checkpoints that need not stay
        self._records: dict[str, FileRecord] = {}
        self._error: Exception | None = None
        self._started = self._waited = 0.0
        self._last_seconds = 0.0  # that the last save took
        # Checkpoints above the first step were passed over, or left behind: none of the last ones to keep.
        self._stale = {step for step in map(manifest.step_of, manifest.checkpoints(folder)) if step > first}
        if self.rank == 0:
            with contextlib.suppress(OSError):  # then saving fails, and says so
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
        self._engine_is_free.clear()
        host_copy = None if hold else self._host_copy
        work = (engine_files(self.engine), manifest.partial_of(self._checkpoint), host_copy)
        self._thread = threading.Thread(target=self._work, args=work)
        self._thread.start()
        self._waited = time.perf_counter() - self._started

    def before_update(self) -> None:
        """Call before every optimizer step: waits until the state that is being saved may change."""
        start = time.perf_counter()
        while not self._engine_is_free.wait(POLL_SECONDS):
            self._waiting()
        self._waited += time.perf_counter() - start

    def complete(self) -> bool:
        """Wait for every rank's files, then make them a checkpoint. Returns whether it was saved; if not, the older
        ones are as they were, and rank 0 has said why."""
        assert self._checkpoint
        assert self._thread
        waiting = time.perf_counter()
        self._join(self._thread)
        self.close()  # what is removed is not to be cleaned away at the same time
        parts: list[Any] = [None] * dist.get_world_size()
        error = None if self._error is None else str(self._error) or repr(self._error)
        dist.all_gather_object(parts, (self._records, error))
        files = {name: record for records, _ in parts for name, record in records.items()}
        outcome = [next((error for _, error in parts if error), None)]
        if self.rank == 0:
            outcome[0] = outcome[0] or self._commit(self._checkpoint, files)
        dist.broadcast_object_list(outcome)
        self._waited += time.perf_counter() - waiting
        if self.rank == 0:
            if outcome[0]:
                self._report_failure(self._checkpoint, outcome[0])
            else:
                self._report(self._checkpoint, sum(record["bytes"] for record in files.values()))
        self._last_seconds = time.perf_counter() - self._started
        self._checkpoint = self._thread = None
        return not outcome[0]

    def expected_seconds(self) -> float:
        """What a save should take: as long as the last, or, before the first, this rank's state on a slow disk."""
        if self._last_seconds:
            return self._last_seconds
        spec = find_optimizer(self.engine.optimizer_name())
        assert spec, "the checks of a run refuse what is not in the table"
        weights = sum(parameter.numel() for parameter in self.engine.module.parameters())
        masters = sum(part.numel() for part in self.engine.optimizer.single_partition_of_fp32_groups)
        return (4 * weights + (4 + spec.state_bytes) * masters) / SLOW_DISK_BYTES_PER_SECOND

    def _work(self, files: dict[str, Any], partial: Path, host_copy: HostCopy | None) -> None:
        """The thread."""
        try:
            copied = host_copy.take(files) if host_copy else None
            if copied is not None:
                self._engine_is_free.set()
            self._write(files if copied is None else copied, partial)
        except Exception as error:  # of any kind: nobody catches an exception of a thread
            self._error = error
        finally:
            self._engine_is_free.set()

    def _write(self, files: dict[str, Any], partial: Path) -> None:
        """Every file of this rank, and on rank 0 the files without tensors."""
        partial.mkdir(parents=True, exist_ok=True)
        for name, state in files.items():
            compact = _map_tensors(state, _own_storage)
            self._records[name] = manifest.write_hashed(partial / name, functools.partial(torch.save, compact))
        if self.rank == 0:
            script = Path(__file__).with_name(SCRIPT).read_bytes()
            run = json.dumps(self.record, indent=2).encode()
            for name, data in ((SCRIPT, script), ("run.json", run)):
                self._records[name] = manifest.write_file(partial / name, data)
        for name in self._records:
            manifest.flush(partial / name)

    def _commit(self, checkpoint: Path, files: dict[str, FileRecord]) -> str | None:
        """On rank 0. Returns why it failed, if so: the other ranks wait to hear of it, so nothing is raised."""
        try:
            for name, record in files.items():
                path = manifest.partial_of(checkpoint) / name
                if not path.is_file() or path.stat().st_size != record["bytes"]:
                    return (
                        f"rank 0 does not see {path} as its rank wrote it; "
                        "put the run on a file system that all hosts share"
                    )
            about = {key: self.record[key] for key in ("world_size", "ep_size")}
            manifest.commit(checkpoint, {"step": manifest.step_of(checkpoint), **about}, files)
        except Exception as error:
            return str(error) or repr(error)
        self._stale.discard(manifest.step_of(checkpoint))
        self._removal = threading.Thread(target=self._prune, args=(checkpoint,))
        self._removal.start()
        return None

    def _prune(self, newest: Path) -> None:
        """On a thread: removing large files takes a while."""
        try:
            manifest.prune(newest, self.keep_last, self.keep_every, self._stale)
        except OSError as error:
            print(f"error: old checkpoints in {self.folder} cannot be removed ({error}).", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wait until what need not stay is removed."""
        if self._removal:
            self._join(self._removal)

    def _join(self, thread: threading.Thread) -> None:
        while thread.is_alive():
            self._waiting()
            thread.join(POLL_SECONDS)

    def _report(self, checkpoint: Path, size: int) -> None:
        print(
            f"saved {checkpoint}: {size / 1e9:.3f} GB in {time.perf_counter() - self._started:.1f} s, of which "
            f"training waited {self._waited:.2f} s",
            flush=True,
        )

    def _report_failure(self, checkpoint: Path, failure: str) -> None:
        older = None
        with contextlib.suppress(OSError):  # of a file system in trouble
            manifest.clean(self.folder)
            older = next(iter(manifest.candidates(self.folder)), None)
        print(
            f"error: {checkpoint} was NOT saved ({failure}); "
            + (f"{older} is still the newest checkpoint" if older else "there is no older checkpoint")
            + "; check that the disk has space, and that every rank can write there.",
            file=sys.stderr,
            flush=True,
        )
