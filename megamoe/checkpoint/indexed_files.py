"""Read a checkpoint of megamoe's own form by its index: only the files and ranges that are asked for, each verified."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.checkpoint.index import BUFFER, FileRecord, Index, SliceRecord
from megamoe.checkpoint.slice_file import DamagedError, SliceFile, TensorRecord, file_sha256

OPEN_FILES = 64


class IndexedFiles:
    """A checkpoint, or as much of it as an index lists. What is read has the bytes that were saved: else UserError."""

    has_optimizer = True

    def __init__(self, folder: Path, index: Index, buffers: dict[str, Tensor] | None = None):
        """
        Args:
            buffers: where they have been read already.
        """
        self.folder = folder
        self.index = index
        self.shapes = {name: tuple(shape) for name, shape in index.shapes.items()}
        self._open = lru_cache(OPEN_FILES)(self._open_file)
        self._slices: dict[str, list[tuple[str, SliceRecord]]] = {}
        for file, record in index.files.items():
            for piece in record.slices:
                self._slices.setdefault(piece.name, []).append((file, piece))
        for slices in self._slices.values():
            slices.sort(key=lambda item: item[1].start)
        self.buffers = buffers or {}
        for one in index.buffers:
            self.buffers[one.name] = self.read(one.name, BUFFER, 0, one.count).view(self.shapes.pop(one.name))
        self.state_names = tuple(index.optimizer.state)

    def state_of(self, name: str) -> tuple[str, ...]:
        return self.index.kinds_of(name)[1:]

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        parts = []
        for file, piece in self._slices.get(name, ()):
            first, last = max(start, piece.start), min(start + count, piece.start + piece.count)
            if first < last:
                record = piece.tensors[kind]
                parts.append(self._open(file).read(record, piece.count, first - piece.start, last - first))
        return (parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])).float()

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

    def _open_file(self, name: str) -> SliceFile:
        record = self.index.files[name]
        return SliceFile(self.folder / name, record.bytes, record.header)


def problems(folder: Path, index: Index, part: int = 0, parts: int = 1) -> list[str]:
    """What keeps the files of a checkpoint from being those that were saved, one sentence each.

    Args:
        part: look at this share only, of `parts`; the shares together cover every file.

    Raises OSError where a file cannot be read now, which does not say that it is damaged.
    """
    tensors = [
        (name, tensor, piece.count)
        for name, record in index.files.items()
        for piece in record.slices
        for tensor in piece.tensors.values()
    ]
    share: dict[str, list[tuple[TensorRecord, int]]] = {}
    for name, tensor, count in tensors[part::parts]:
        share.setdefault(name, []).append((tensor, count))
    if part == 0:  # with files in which there is no tensor
        share = {name: share.get(name, []) for name in index.files}
    found = [problem for name, some in share.items() for problem in _problems(folder / name, index.files[name], some)]
    return list(dict.fromkeys(found))


def _problems(path: Path, record: FileRecord, tensors: list[tuple[TensorRecord, int]]) -> list[str]:
    try:
        if record.sha256 is not None:
            return whole_file_problems(path, record)
        file = SliceFile(path, record.bytes, record.header)
        return [problem for tensor, count in tensors for problem in file.problems(tensor, count)]
    except DamagedError as error:
        return error.problems


def whole_file_problems(path: Path, record: FileRecord) -> list[str]:
    """What keeps a file that is hashed as one from being what was saved. Raises OSError where it cannot be read now."""
    try:
        is_same = path.stat().st_size == record.bytes and file_sha256(path) == record.sha256
    except FileNotFoundError:
        return [f"{path} is missing; bring it back, or use an older checkpoint."]
    return [] if is_same else [f"{path} has not the bytes with which it was saved; use an older checkpoint."]
