"""The index of a checkpoint: which file holds which values, their hashes, and all that is not a tensor.

Each rank writes RANK.safetensors and gives its part of the index; rank 0 joins the parts. A checkpoint exists once its
index.json does. There is no random state in it: dropout and jitter follow from seed, rank and step.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megamoe.checkpoint import folders
from megamoe.checkpoint.slice_file import CONTAINER_DTYPES, TensorRecord, number_of_blocks, sha256, write_tensors
from megamoe.config.optimizers import MASTERS, find_optimizer
from megamoe.model.names import is_projection
from megamoe.utils import disk
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import parse_json

BUFFER = "buffer"  # the kind of router statistics, where others are MASTERS and the optimizer's state tensors
TENSOR_NAME = re.compile(r"[\w.]+")  # it may become the name of a file


Count = Annotated[int, Field(ge=0, lt=2**53)]  # a float holds each


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SliceRecord(_Part):
    """A stretch of one flattened parameter or buffer in one file."""

    name: str
    """Plain name, with the expert's id in the model."""
    start: Count
    """Its first value in the parameter."""
    count: Count
    """Number of values."""
    tensors: dict[str, TensorRecord]
    """By kind: MASTERS and the optimizer's state tensors, or BUFFER."""

    def only(self, kinds: Collection[str]) -> SliceRecord:
        """Without the tensors of other kinds."""
        return self.model_copy(update={"tensors": {kind: one for kind, one in self.tensors.items() if kind in kinds}})


class FileRecord(_Part):
    """One file of a checkpoint."""

    bytes: Count
    sha256: str | None = None
    """Of a file that is not a rank's."""
    header: str = ""
    """SHA-256 of the header of a rank's file; the slices have their own."""
    slices: list[SliceRecord] = []


class Topology(_Part):
    """What saved it."""

    world_size: int = Field(gt=0)
    ep_size: int = Field(gt=0)
    zero_stage: int = Field(ge=0)


class SchedulerPosition(_Part):
    """Of the learning-rate scheduler, which stays behind the step where steps were skipped."""

    last_epoch: Count
    step_count: Count


class OptimizerRecord(_Part):
    """The optimizer, but for its tensors."""

    name: str
    state: list[str]
    """Kinds of its state tensors; none before the first applied step."""
    step: float | None = Field(ge=0, lt=2**53)
    """Steps that it has applied; None where it has not begun, or does not count."""
    step_dtype: str | None = Field(pattern="^(float32|float64|int64)$")
    """Where it keeps that number as a tensor."""
    groups: list[dict[str, Any]]
    """Hyperparameters of its groups, in order."""


class TrainingRecord(_Part):
    """Counters of a run."""

    global_samples: Count
    skipped_steps: Count
    skipped_in_window: Count
    """Steps since the save before whose gradients were not finite, but for those that only lower the loss scale."""
    scheduler: SchedulerPosition
    loss_scaler: dict[str, float | int | bool | None]
    """Its fields by name."""


@dataclass(frozen=True)
class Range:
    """Values of a flattened parameter."""

    name: str
    start: int
    count: int


class Index(_Part):
    """A checkpoint, or the part of it that one rank needs."""

    version: Literal[2] = 2
    save_id: str
    """Random; every file of the save carries it."""
    run_id: str | None
    """Of the run folder that it was saved in."""
    step: Count
    parent: str | None
    """The checkpoint that the run had resumed from."""
    topology: Topology
    training: TrainingRecord
    guard: dict[str, Any] | None = None
    """State of the run's guard, see `training/guard.py`; None without one."""
    optimizer: OptimizerRecord
    run: dict[str, Any]
    """The run's record: model, options, DeepSpeed JSON, versions."""
    shapes: dict[str, list[Count]]
    """Of parameters and buffers by plain name."""
    files: dict[str, FileRecord]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of parameters."""
        return MASTERS, *self.optimizer.state

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """What is kept of a parameter: MASTERS, and of the optimizer's state tensors those that it has for it."""
        spec = find_optimizer(self.optimizer.name)
        kept = spec.state_of(is_projection(name)) if spec else ()
        absent = {tensor.name for tensor in spec.state if tensor not in kept} if spec else ()
        return tuple(kind for kind in self.kinds if kind not in absent)

    def parts(self, wanted: list[list[Range]]) -> list[Index]:
        """For each list of `wanted` values the index of the slices that hold any of them."""
        held: dict[str, list[tuple[str, SliceRecord]]] = defaultdict(list)
        for file, record in self.files.items():
            for piece in record.slices:
                held[piece.name].append((file, piece))
        return [
            self._with_slices(
                [
                    (file, piece)
                    for one in ranges
                    for file, piece in held.get(one.name, ())
                    if one.start < piece.start + piece.count and piece.start < one.start + one.count
                ]
            )
            for ranges in wanted
        ]

    @property
    def buffers(self) -> list[Range]:
        """Those of the router statistics."""
        pieces = [piece for record in self.files.values() for piece in record.slices if BUFFER in piece.tensors]
        names = dict.fromkeys(piece.name for piece in pieces)
        return [Range(name, 0, math.prod(self.shapes[name])) for name in names]

    def _with_slices(self, slices: list[tuple[str, SliceRecord]]) -> Index:
        by_file: dict[str, list[SliceRecord]] = defaultdict(list)
        for file, piece in slices:
            by_file[file].append(piece)
        files = {file: self.files[file].model_copy(update={"slices": pieces}) for file, pieces in by_file.items()}
        shapes = {piece.name: self.shapes[piece.name] for _, piece in slices}
        return self.model_copy(update={"files": files, "shapes": shapes})

    def share(self, kinds: Collection[str], part: int, parts: int) -> Index:
        """A share of the tensors of these kinds and of the files without slices; all shares together have them all."""
        files = {}
        for name, record in self.files.items() if kinds or part == 0 else ():
            if record.slices:
                slices = [piece.only(kinds) for piece in record.slices[part::parts]]
                if slices := [piece for piece in slices if piece.tensors]:
                    files[name] = record.model_copy(update={"slices": slices})
            elif part == 0:
                files[name] = record
        return self.model_copy(update={"files": files, "shapes": {}})


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlatSlice:
    """A stretch of one flattened parameter or buffer, to be written."""

    name: str  # plain
    start: int  # in the parameter
    tensors: dict[str, Tensor]  # by kind, (count,)


def write_slices(path: Path, save_id: str, slices: list[FlatSlice]) -> FileRecord:
    """Write a rank's new file; returns what the index says about it. Raises OSError.

    The bytes are not yet on the disk: see `disk.flush`.
    """
    kinds = dict.fromkeys(kind for piece in slices for kind in piece.tensors)  # one after the other in the file
    flat = {f"{kind}/{piece.name}": piece.tensors[kind] for kind in kinds for piece in slices if kind in piece.tensors}
    header, records = write_tensors(path, flat, {"format": "pt", "save": save_id, "file": path.name})
    written = [
        SliceRecord(
            name=piece.name, start=piece.start, count=len(next(iter(piece.tensors.values()))),
            tensors={kind: records[f"{kind}/{piece.name}"] for kind in piece.tensors},
        )
        for piece in slices
    ]  # fmt: skip
    return FileRecord(bytes=path.stat().st_size, header=header, slices=written)


def write_index(checkpoint: Path, index: Index) -> None:
    """Make the folder, all of whose files are on the disk, a checkpoint: a reader finds a complete index or none.

    There is no rename, so a file system that stores objects can do this too; an index that ends early is none. Raises
    OSError.
    """
    disk.flush(checkpoint)
    body = _canonical(index.model_dump())
    data = f'{{"sha256": "{sha256(body.encode())}",\n"index": {body}}}\n'.encode()
    try:
        disk.write_file(checkpoint / folders.INDEX, data)
        disk.flush(checkpoint)
    except FileExistsError:
        raise
    except Exception:  # it may be complete, but a save that failed is no checkpoint
        (checkpoint / folders.INDEX).unlink(missing_ok=True)
        raise


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# --- reading --------------------------------------------------------------------------------------------------------


def read_index(checkpoint: Path) -> Index:
    """The index of a checkpoint, which is what was written and belongs to its folder. Raises UserError if it is not,
    and OSError if it cannot be read now."""
    path = checkpoint / folders.INDEX
    content = parse_json(path.read_bytes(), path)
    body = content.get("index")
    if not isinstance(body, dict) or content.get("sha256") != sha256(_canonical(body).encode()):
        raise UserError(f"{path} is not as it was written, or not all of it; use an older checkpoint.")
    if body.get("version") != 2:
        raise UserError(f"{path} has version {body.get('version')!r}, and this megamoe reads 2; use a newer megamoe.")
    try:
        index = Index.model_validate(body)
        problems = [*_misplaced(checkpoint, index), *_inconsistencies(index)]
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))!r}: {one['msg']}" for one in error.errors()[:3]]
    if problems:
        raise UserError(*(f"{path}: {problem}; use an older checkpoint." for problem in problems))
    return index


def _misplaced(checkpoint: Path, index: Index) -> list[str]:
    """What shows that the index belongs to another folder: names can be swapped, copied or linked."""
    problems = []
    step = folders.step_of(checkpoint)
    if step is not None and step != index.step:
        problems.append(f"it is of step {index.step}, but its folder is called {checkpoint.name}")
    run = folders.run_of(checkpoint)
    if run and run.get("run_id") != index.run_id:
        problems.append(f"it is of the run {index.run_id}, but lies in the folder of the run {run.get('run_id')}")
    return problems


def _inconsistencies(index: Index) -> list[str]:
    """What the index says that cannot be."""
    problems = [
        f"{name!r} is no name of its files"
        for name in index.files
        if not folders.FILE.fullmatch(name) or name == folders.INDEX
    ]
    kinds_held = {kind for record in index.files.values() for piece in record.slices for kind in piece.tensors}
    names = {*index.shapes, *index.optimizer.state, *kinds_held}
    problems += [f"{name!r} is no name of a tensor" for name in sorted(names) if not TENSOR_NAME.fullmatch(name)]
    problems += [f"{name} has no SHA-256" for name, one in index.files.items() if not (one.sha256 or one.header)]
    if problems:
        return problems[:3]
    held: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for name, record in index.files.items():
        for piece in record.slices:
            if piece.name not in index.shapes:
                return [f"{name} holds {piece.name!r}, which has no shape"]
            for kind, tensor in piece.tensors.items():
                held[piece.name, kind].append((piece.start, piece.count))
                nbytes = piece.count * (tensor.itemsize if tensor.dtype in CONTAINER_DTYPES else 0)
                if (
                    tensor.dtype not in CONTAINER_DTYPES
                    or tensor.offset + nbytes > record.bytes
                    or len(tensor.sha256) != number_of_blocks(nbytes)
                ):
                    problems.append(f"{name} cannot hold the {kind} of {piece.name} as it says")
    kinds = {name: (BUFFER,) if (name, BUFFER) in held else index.kinds_of(name) for name in index.shapes}
    for name, shape in index.shapes.items():
        for kind in kinds[name]:
            position = 0
            for start, count in sorted(held[name, kind]):
                position = position + count if start == position else -1
            if position != math.prod(shape):
                problems.append(f"its files do not hold each value of the {kind} of {name} once")
    return problems[:3]
