"""The index of a checkpoint: which file holds which values, their hashes, and all that is not a tensor.

Each rank writes RANK.safetensors and gives its part of the index; rank 0 joins the parts. A checkpoint exists once its
index.json does. There is no random state in it: dropout and jitter follow from seed, rank and step.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from megamoe.checkpoint import folders
from megamoe.checkpoint.slice_file import Record, TensorRecord, sha256, write_tensors
from megamoe.utils import disk
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import parse_json

BUFFER = "buffer"  # the kind of router statistics, where others are MASTERS and the optimizer's state tensors

Count = Annotated[int, Field(ge=0, lt=2**53)]  # a float holds each
TensorName = Annotated[str, Field(pattern=r"^[\w.]+$")]  # it may become the name of a file


class SliceRecord(Record):
    """A stretch of one flattened parameter or buffer in one file."""

    name: TensorName
    """Plain name, with the expert's id in the model."""
    start: Count
    """Its first value in the parameter."""
    count: Count
    """Number of values."""
    tensors: dict[TensorName, TensorRecord]
    """By kind: MASTERS and the optimizer's state tensors, or BUFFER."""


class FileRecord(Record):
    """One file of a checkpoint."""

    bytes: Count
    sha256: str | None = None
    """Of a file that is not a rank's."""
    header: str = ""
    """SHA-256 of the header of a rank's file; the slices have their own."""
    slices: list[SliceRecord] = Field(default_factory=list)


class Topology(Record):
    """What saved it."""

    world_size: int = Field(gt=0)
    ep_size: int = Field(gt=0)
    zero_stage: int = Field(ge=0)


class SchedulerPosition(Record):
    """Of the learning-rate scheduler, which stays behind the step where steps were skipped."""

    last_epoch: Count
    step_count: Count


class OptimizerRecord(Record):
    """The optimizer, but for its tensors."""

    name: str
    state: list[TensorName]
    """Kinds of its state tensors; none before the first applied step."""
    step: float | None = Field(ge=0, lt=2**53)
    """Steps that it has applied; None where it has not begun, or does not count."""
    step_dtype: str | None = Field(pattern="^(float32|float64|int64)$")
    """Where it keeps that number as a tensor."""
    groups: list[dict[str, Any]]
    """Hyperparameters of its groups, in order."""


class TrainingRecord(Record):
    """Counters of a run."""

    global_samples: Count
    skipped_steps: Count
    skipped_in_window: Count
    """Steps since the save before whose gradients were not finite, but for those that only lower the loss scale."""
    scheduler: SchedulerPosition
    loss_scaler: dict[str, float | int | bool | None]
    """Its fields by name."""


class Index(Record):
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
    shapes: dict[TensorName, list[Count]]
    """Of parameters and buffers by plain name."""
    files: dict[Annotated[str, Field(pattern=f"^({folders.FILE.pattern})$")], FileRecord]


def share_of(
    files: dict[str, FileRecord], part: int, parts: int, kinds: Collection[str] | None = None
) -> dict[str, FileRecord]:
    """One of `parts` shares of the files without slices, and of the tensors in others; all shares together have each
    once.

    Args:
        kinds: of the tensors; by default all.
    """
    pieces: list[tuple[str, SliceRecord | None]] = []
    for name, record in files.items():
        for piece in record.slices:
            tensors = {kind: one for kind, one in piece.tensors.items() if kinds is None or kind in kinds}
            if tensors:
                pieces.append((name, piece.model_copy(update={"tensors": tensors})))
        if not record.slices:
            pieces.append((name, None))
    first, last = (len(pieces) * number // parts for number in (part, part + 1))
    held: dict[str, list[SliceRecord]] = defaultdict(list)
    for name, one in pieces[first:last]:  # one after the other, so that few files are opened
        held[name] += [one] if one else []
    return {name: files[name].model_copy(update={"slices": slices}) for name, slices in held.items()}


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """A stretch of one flattened parameter or buffer on this rank."""

    name: str  # plain
    shape: tuple[int, ...]  # of the parameter
    start: int  # in the flattened parameter
    count: int
    offset: int  # in the flat tensors of its group


@dataclass(frozen=True)
class FlatGroup:
    """What one rank saves of many parameters: flat tensors, so that they are copied at once."""

    tensors: dict[str, Tensor]  # by kind
    stretches: list[Stretch]


def write_slices(path: Path, save_id: str, groups: list[FlatGroup]) -> FileRecord:
    """Write a rank's new file; returns what the index says about it. Raises OSError.

    The bytes are not yet on the disk: see `disk.flush`.
    """
    kinds = dict.fromkeys(kind for group in groups for kind in group.tensors)  # one after the other in the file
    flat = {
        f"{kind}/{one.name}": group.tensors[kind][one.offset : one.offset + one.count]
        for kind in kinds
        for group in groups
        if kind in group.tensors
        for one in group.stretches
    }
    header, records = write_tensors(path, flat, {"format": "pt", "save": save_id, "file": path.name})
    slices = [
        SliceRecord(
            name=one.name, start=one.start, count=one.count,
            tensors={kind: records[f"{kind}/{one.name}"] for kind in group.tensors},
        )
        for group in groups
        for one in group.stretches
    ]  # fmt: skip
    return FileRecord(bytes=path.stat().st_size, header=header, slices=slices)


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
    """What the index says that cannot be. Whether each value is there once is seen where it is read."""
    return [
        f"{name} cannot hold {piece.name} as it says"
        for name, record in index.files.items()
        for piece in record.slices
        if piece.name not in index.shapes
        or any(one.offset + piece.count * one.itemsize > record.bytes for one in piece.tensors.values())
    ][:3]
