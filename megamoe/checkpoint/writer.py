"""Save a training engine without holding it up.

A thread of each rank copies the state to host memory, writes it into a file of its own, and posts its part of the
index; rank 0's thread joins the parts and writes the index, which makes the folder a checkpoint (`index.py`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import DistError, HashStore, PrefixStore, Store

from megamoe.checkpoint import folders
from megamoe.checkpoint.engine_state import optimizer_record, optimizer_spec, rank_state, training_record
from megamoe.checkpoint.host_copy import HostCopy
from megamoe.checkpoint.index import FileRecord, FlatGroup, Index, Topology, write_index, write_slices
from megamoe.checkpoint.retention import Retention
from megamoe.checkpoint.slice_file import sha256
from megamoe.data.ledger import DataLedger
from megamoe.launch.exchange import ask, forget, post, receive, serve
from megamoe.utils import disk

POLL_SECONDS = 0.1
SLOW_DISK_BYTES_PER_SECOND = 100e6


@dataclass(frozen=True)
class _Save:
    """One save, as the thread gets it."""

    number: int  # of this writer
    store: Store  # where the ranks exchange what they say about it, for a thread may call no collective
    step: int
    state: list[FlatGroup]
    index: Index | None  # on rank 0: all but the files
    is_held: bool  # training waits for its end
    good_until: int | None  # see `Retention.prune`
    ready: torch.cuda.Event | None  # on a GPU: the state has the values to be saved
    started: float


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
        store: Store | None,
        keep_last: int = 0,
        keep_every: int = 0,
        background: bool = True,
        resumed: Path | None = None,
        ledger: DataLedger | None = None,
        waiting: Callable[[], None] = lambda: None,
        saved: Callable[[int, dict[str, Any]], None] = lambda step, values: None,
    ):
        """
        Args:
            record: of the run; goes into every checkpoint's index, with its "run_id".
            store: that all ranks share; None for a single rank.
            keep_last, keep_every: see `Retention`.
            background: copy the state and write while training continues, if the host has memory for the copy.
            resumed: the checkpoint that the run resumes from.
            ledger: of the run; None for one that has never gone back.
            waiting: called repeatedly while training waits for files, so that the rank does not count as stalled.
            saved: called on rank 0, by a thread, with the step of a save that is a checkpoint now and what it took.
        """
        self.engine = engine
        self.folder = folder
        self.record = record
        self.rank = dist.get_rank()
        self._resumed = resumed
        self._waiting = waiting
        self._saved = saved
        self._ranks = range(dist.get_world_size())
        store = store or HashStore()
        # The same number on every rank, for each makes the same writers.
        self._store = PrefixStore(f"writer/{store.add(f'writers/{self.rank}', 1)}", store)
        self._host_copy = HostCopy() if background else None
        self._saves = 0
        self._thread: threading.Thread | None = None
        self._engine_is_free = threading.Event()  # set while the thread does not read the engine's own tensors
        self._engine_is_free.set()
        self._failure: str | None = None  # of the last save
        self._skipped = 0  # steps of its window
        self._size = 0  # in bytes
        self._waited = 0.0
        self._last_seconds = 0.0  # that the last save took
        self.retention: Retention | None = None  # on rank 0
        if self.rank == 0:
            with contextlib.suppress(OSError):  # then leftovers stay, and no name of theirs is used again
                folders.clean(folder)
            self.retention = Retention(folder, keep_last, keep_every, resumed, ledger or DataLedger())

    @property
    def pending(self) -> bool:
        """Whether a save is begun and not completed; the same on every rank."""
        return self._thread is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def go_back(self, checkpoint: Path) -> int:
        """Leave those after `checkpoint` behind; returns the generation of the next ones. On rank 0, with no save
        pending. Raises OSError."""
        assert self.retention
        self._resumed, self._skipped = checkpoint, 0
        self._name_latest(checkpoint)
        return self.retention.go_back(checkpoint)

    def save(
        self,
        step: int,
        hold: bool = False,
        skipped: int = 0,
        guard: dict[str, Any] | None = None,
        good_until: int | None = None,
    ) -> None:
        """Begin to save; `complete` ends it. Waits for the one before, if that is not complete.

        Args:
            hold: nothing is trained until it is complete, so that no copy is needed.
            skipped: steps since the save before whose gradients were not finite.
            guard: state of the run's guard.
            good_until: the last step whose checkpoint the run might go back to; None where it does not.
        """
        started = time.perf_counter()
        if self.pending:
            self.complete()
        self._saves += 1
        self._skipped = skipped + (self._skipped if self._failure else 0)  # a save that failed passes its own on
        self._failure = "the thread that saves has failed"  # until it says otherwise
        self._engine_is_free.clear()
        index = self._index(step, self._skipped, guard) if self.rank == 0 else None
        store, state = PrefixStore(str(self._saves), self._store), rank_state(self.engine)
        ready = torch.cuda.current_stream().record_event() if self.engine.device.type == "cuda" else None
        save = _Save(self._saves, store, step, state, index, hold, good_until, ready, started)
        self._thread = threading.Thread(target=self._work, args=(save, None if hold else self._host_copy), daemon=True)
        self._thread.start()
        self._waited = time.perf_counter() - started

    def before_update(self) -> None:
        """Call before every optimizer step: waits until the state that is being saved may change."""
        start = time.perf_counter()
        while not self._engine_is_free.wait(POLL_SECONDS):
            self._waiting()
        self._waited += time.perf_counter() - start

    def complete(self) -> bool:
        """Wait for the end of the save. Returns whether it is a checkpoint, the same on every rank; if not, the older
        ones are as they were, and rank 0 has said why."""
        assert self._thread
        while self._thread.is_alive():
            self._waiting()
            self._thread.join(POLL_SECONDS)
        self._thread = None
        return self._failure is None

    def expected_seconds(self) -> float:
        """What a save should take: as long as the last, or, before the first, this rank's state on a slow disk."""
        if self._last_seconds:
            return self._last_seconds
        masters = sum(part.numel() for part in self.engine.optimizer.single_partition_of_fp32_groups)
        return (4 + optimizer_spec(self.engine).state_bytes(is_matrix=False)) * masters / SLOW_DISK_BYTES_PER_SECOND

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self, save: _Save, host_copy: HostCopy | None) -> None:
        try:
            if save.ready:
                torch.cuda.set_device(self.engine.device)  # a new thread's is the first, where it would take memory
            part = self._write(save, host_copy)
            self._failure = self._conclude(save, part)
            self._last_seconds = time.perf_counter() - save.started
            if save.index and save.number > 1:  # every rank has taken part in this one, and is done with that before
                forget(PrefixStore(str(save.number - 1), self._store), self._ranks, "plan")
            if self.retention:
                self._report(save)
                if self._failure is None:
                    self.retention.prune(save.good_until)
        except DistError as error:  # rank 0 has died; `launch/watch.py` ends this one
            self._failure = str(error)
        finally:
            self._engine_is_free.set()

    def _conclude(self, save: _Save, part: dict[str, Any]) -> str | None:
        """Give rank 0 this rank's part; returns why the save failed, if so, the same on every rank."""
        index = save.index
        if index is None:
            return ask(save.store, self.rank, part)
        return serve(
            save.store, 0, part, self._ranks, lambda parts: self._commit(list(parts.values()), index),
            exits=lambda failure: False,
        )  # fmt: skip

    def _write(self, save: _Save, host_copy: HostCopy | None) -> dict[str, Any]:
        """Write this rank's file; returns its part of the index, or the error: the other ranks wait for it, so nothing
        is raised but DistError."""
        if save.index:
            post(save.store, "plan", self._begin(save.index))
        try:
            state = save.state
            if host_copy and (copy := _copied(state, host_copy, save.ready)):
                state = copy
                self._engine_is_free.set()
            plan = receive(save.store, "plan")
            if plan["error"]:
                return {"error": plan["error"]}
            return self._write_file(Path(plan["checkpoint"]), plan["save_id"], state)
        except DistError:
            raise
        except Exception as error:
            return {"error": str(error) or repr(error)}
        finally:
            self._engine_is_free.set()

    def _write_file(self, checkpoint: Path, save_id: str, state: list[FlatGroup]) -> dict[str, Any]:
        path = checkpoint / folders.rank_file(self.rank)
        record = write_slices(path, save_id, state)
        disk.flush(path)
        shapes = {one.name: one.shape for group in state for one in group.stretches}
        return {"save_id": save_id, "file": path.name, "record": record.model_dump(), "shapes": shapes}

    # --- rank 0 -----------------------------------------------------------------------------------------------------

    def _index(self, step: int, skipped: int, guard: dict[str, Any] | None) -> Index:
        return Index(
            save_id=uuid.uuid4().hex,
            run_id=self.record.get("run_id"),
            step=step,
            parent=self._resumed.name if self._resumed else None,
            topology=Topology(
                world_size=len(self._ranks),
                ep_size=self.engine.module.topology.ep_size,
                zero_stage=int(self.engine.zero_optimization_stage()),
            ),
            training=training_record(self.engine, skipped),
            guard=guard,
            optimizer=optimizer_record(self.engine),
            run=self.record,
            shapes={},
            files={},
        )

    def _begin(self, index: Index) -> dict[str, Any]:
        """Make the folder; returns what every rank has to know."""
        checkpoint = self._checkpoint(index.step)
        try:
            self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that was removed is not made again
            checkpoint.mkdir()
        except OSError as error:
            return {"error": str(error)}
        return {"error": None, "checkpoint": str(checkpoint), "save_id": index.save_id}

    def _commit(self, parts: list[dict[str, Any]], index: Index) -> str | None:
        """Join the parts of all ranks. Returns why it failed, if so: the others wait to hear of it, so nothing is
        raised."""
        checkpoint = self._checkpoint(index.step)
        try:
            error = next((part["error"] for part in parts if "error" in part), None)
            if error:
                return error
            files = {part["file"]: FileRecord(**part["record"]) for part in parts}
            for part in parts:
                path = checkpoint / part["file"]
                is_there = path.exists() and path.stat().st_size == part["record"]["bytes"]
                if part["save_id"] != index.save_id or not is_there:
                    return (
                        f"rank 0 does not see {path} as its rank wrote it; put the run on a file system that all hosts "
                        "share"
                    )
            files[folders.SCRIPT] = _add_script(checkpoint)
            shapes = {name: shape for part in parts for name, shape in part["shapes"].items()}
            write_index(checkpoint, index.model_copy(update={"files": files, "shapes": shapes}))
        except Exception as error:
            return str(error) or repr(error)
        assert self.retention
        self.retention.add(checkpoint, index.training.skipped_in_window)
        self._name_latest(checkpoint)
        self._size = sum(record.bytes for record in files.values())
        return None

    def _checkpoint(self, step: int) -> Path:
        assert self.retention
        return self.retention.path_of(step)

    def _name_latest(self, checkpoint: Path) -> None:
        with contextlib.suppress(OSError):  # only other programs read it
            disk.replace_file(self.folder / "latest", checkpoint.name)

    def _report(self, save: _Save) -> None:
        checkpoint = self._checkpoint(save.step)
        if self._failure is None:
            waited = self._last_seconds if save.is_held else self._waited
            print(
                f"saved {checkpoint}: {self._size / 1e9:.3f} GB in {self._last_seconds:.1f} s, of which training "
                f"waited {waited:.2f} s",
                flush=True,
            )
            took = {"bytes": self._size, "seconds": self._last_seconds, "waited_seconds": waited}
            self._saved(save.step, {"checkpoint": checkpoint.name, **took})
            return
        older = None
        with contextlib.suppress(OSError):  # of a file system in trouble
            if checkpoint.is_dir():
                folders.discard(checkpoint)
            older = next(iter(folders.checkpoints(self.folder)), None)
        print(
            f"error: {checkpoint} was NOT saved ({self._failure}); "
            + (f"{older} is still the newest checkpoint" if older else "there is no older checkpoint")
            + "; check that the disk has space, and that every rank can write there.",
            file=sys.stderr,
            flush=True,
        )


def _copied(state: list[FlatGroup], host_copy: HostCopy, ready: torch.cuda.Event | None) -> list[FlatGroup] | None:
    """In host memory, if there is room."""
    copies = host_copy.take([flat for group in state for flat in group.tensors.values()], ready)
    if copies is None:
        return None
    flat = iter(copies)
    return [FlatGroup({kind: next(flat) for kind in group.tensors}, group.stretches) for group in state]


def _add_script(checkpoint: Path) -> FileRecord:
    data = Path(__file__).with_name(folders.SCRIPT).read_bytes()
    disk.write_file(checkpoint / folders.SCRIPT, data)
    return FileRecord(bytes=len(data), sha256=sha256(data))
