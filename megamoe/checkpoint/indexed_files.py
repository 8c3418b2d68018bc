"""Read a checkpoint of megamoe's own form by its index: only the files and ranges that are asked for, each verified."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.checkpoint import folders
from megamoe.checkpoint.index import BUFFER, FileRecord, Index, SliceRecord
from megamoe.checkpoint.slice_file import DamagedError, SliceFile
from megamoe.utils.disk import file_sha256

OPEN_FILES = 64


class IndexedFiles:
    """A checkpoint by its index. What is read has the bytes that were saved: else UserError."""

    has_optimizer = True

    def __init__(self, folder: Path, index: Index, buffers: dict[str, Tensor] | None = None):
        """
        Args:
            buffers: where they have been read already.
        """
        self.folder = folder
        self.index = index
        self.state_names = tuple(index.optimizer.state)
        self._open = lru_cache(OPEN_FILES)(
            lambda file: SliceFile(folder / file, index.files[file].bytes, index.files[file].header)
        )
        self._slices: dict[str, list[tuple[str, SliceRecord]]] = {}
        for file, record in index.files.items():
            for piece in record.slices:
                self._slices.setdefault(piece.name, []).append((file, piece))
        for slices in self._slices.values():
            slices.sort(key=lambda item: item[1].start)
        self.shapes = {name: tuple(shape) for name, shape in index.shapes.items()}
        of_buffers = {name: self.shapes.pop(name) for name in index.shapes if BUFFER in self._kinds(name)}
        self.buffers = buffers or {
            name: self.read(name, BUFFER, 0, math.prod(shape)).view(shape) for name, shape in of_buffers.items()
        }

    def _kinds(self, name: str) -> Collection[str]:
        return self._slices[name][0][1].tensors if name in self._slices else ()

    def state_of(self, name: str) -> tuple[str, ...]:
        return tuple(kind for kind in self.state_names if kind in self._kinds(name))

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        parts, end = [torch.empty(0)], start
        for file, piece in self._slices.get(name, ()):
            first, last = max(start, piece.start), min(start + count, piece.start + piece.count)
            if first == end < last and kind in piece.tensors:
                record, end = piece.tensors[kind], last
                parts.append(self._open(file).read(record, piece.count, first - piece.start, last - first))
        if end != start + count:
            raise DamagedError(
                f"{self.folder / folders.INDEX} does not list all values of the {kind} of {name}; use an older "
                "checkpoint."
            )
        return (parts[1] if len(parts) == 2 else torch.cat(parts)).float()

    def training_state(self) -> dict[str, Any]:
        index = self.index
        step: Any = index.optimizer.step
        if step is not None:
            dtype = index.optimizer.step_dtype
            step = torch.tensor(step, dtype=getattr(torch, dtype)) if dtype else int(step)
        return {
            "global_steps": index.step,
            "global_samples": index.training.global_samples,
            "skipped_steps": index.training.skipped_steps,
            "lr_scheduler": {
                "last_epoch": index.training.scheduler.last_epoch,
                "_step_count": index.training.scheduler.step_count,
            },
            "loss_scaler": index.training.loss_scaler,
            "optimizer_step": step,
            "groups": index.optimizer.groups,
        }


def problems(folder: Path, files: dict[str, FileRecord]) -> list[str]:
    """What keeps these files of a checkpoint from being those that were saved, one sentence for each.

    Raises OSError where a file cannot be read now, which does not say that it is damaged.
    """
    found = []
    for name, record in files.items():
        try:
            _verify(folder / name, record)
        except DamagedError as error:
            found += error.problems
    return found


def _verify(path: Path, record: FileRecord) -> None:
    if record.sha256 is None:
        file = SliceFile(path, record.bytes, record.header)
        for piece in record.slices:
            for tensor in piece.tensors.values():
                file.verify(tensor, piece.count)
        return
    try:
        is_same = path.stat().st_size == record.bytes and file_sha256(path) == record.sha256
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing; bring it back, or use an older checkpoint.") from None
    if not is_same:
        raise DamagedError(f"{path} has not the bytes with which it was saved; use an older checkpoint.")
