"""A corpus from units of input, by any number of processes, and on from where a run of it was killed.

What is finished is kept in .NAME.partial next to the output: settings.json, tokenizer.json, the shards of each unit
and, written last, its record. A unit's files are a function of the settings and of its part of the input alone.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megamoe.config.model import JsonModel, validate
from megamoe.data.corpus import SPLITS, complete, split_documents, write_shards
from megamoe.data.corpus_record import CorpusRecord, ShardRecord, SourceRecord
from megamoe.data.encoder import load_encoder
from megamoe.data.inputs import Unit
from megamoe.data.selection import Selection
from megamoe.data.worker_pool import Progress, run_all
from megamoe.utils.disk import PARTIAL, check_absent, flush, replace_file
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json

SAMPLE = 256 << 20  # characters that a tokenizer is trained on


class UnitRecord(JsonModel):
    """What came of a unit."""

    source: str
    shards: dict[str, ShardRecord]  # by split
    lengths: dict[str, int]
    dropped: dict[str, int]


def key_of(unit: Unit) -> str:
    """Names a unit by what is read: the files' names, sizes and times, and the ranges."""
    parts = []
    for part in unit.parts:
        status = part.file.stat()
        parts.append([str(part.file.resolve()), status.st_size, status.st_mtime_ns, part.start, part.stop])
    return sha256(json.dumps([unit.source, parts]).encode()).hexdigest()[:32]


@contextmanager
def partial_corpus(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder that becomes `out` when the block ends, with what an earlier call has finished next to it. After an
    error it is kept if a unit is finished. Raises UserError for `out` or other `settings`, or where another process is
    at work."""
    check_absent(out)
    work = out.with_name(f".{out.name}{PARTIAL}")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            with suppress(NotImplementedError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out} is being written by another process; wait for it, or choose another output."
            ) from None
        _check_settings(work, work / out.name, settings)
        try:
            yield work / out.name
        except BaseException:
            if not list(work.glob("units/*.json")):
                shutil.rmtree(work)
            raise
        flush(work / out.name)
        (work / out.name).rename(out)
        flush(out.parent)
        shutil.rmtree(work)


def _check_settings(work: Path, folder: Path, settings: dict[str, Any]) -> None:
    file = work / "settings.json"
    if file.exists() and folder.is_dir():  # it is not where a run was killed after the renaming
        found = read_json(file)
        differing = [name for name, value in settings.items() if found.get(name) != value]
        if differing:
            raise UserError(
                f"{work} holds an unfinished corpus, begun with another {', '.join(differing)}; give the same, or "
                "remove that folder to begin again."
            )
        return
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    folder.mkdir()
    (work / "units").mkdir()
    replace_file(file, json.dumps(settings))


def training_texts(
    units: list[Unit], kept: list[np.ndarray | None], selection: Selection, valid_fraction: float, bar: Any
) -> Iterator[str]:
    """Documents of the training split to train a tokenizer on: all, or of a corpus above SAMPLE the first of each unit.

    Args:
        bar: of tqdm, over the bytes of the units.
    """
    share = SAMPLE / max(sum(unit.size for unit in units), SAMPLE)
    read = 0
    for unit, mask in zip(units, kept, strict=True):
        left = unit.size * share if share < 1 else float("inf")

        def advance(done: int, before: int = read) -> None:
            bar.update(before + done - bar.n)

        documents = _distinct(selection.read(unit, Counter(), advance), mask)
        for split, text in split_documents(documents, valid_fraction):
            if split == "train":
                yield text
                left -= len(text)
            if left <= 0:
                break
        read += unit.size
        advance(unit.size)


def _distinct(documents: Iterator[str], mask: np.ndarray | None) -> Iterator[str]:
    if mask is None:
        yield from documents
    else:
        yield from (text for text, is_first in zip(documents, mask, strict=True) if is_first)


@dataclass(frozen=True)
class UnitWriter:
    """Turns units into shards, in any process."""

    folder: Path  # of `partial_corpus`
    tokenizer: Path
    is_fast: bool
    end_id: int
    dtype: type
    valid_fraction: float
    selection: Selection

    def write(self, unit: Unit, key: str, mask: np.ndarray | None, progress: Progress) -> None:
        """Write a unit's shards, then its record.

        Args:
            mask: (documents,), which of them are kept; None for all.
        """
        dropped = Counter({"duplicate": int((~mask).sum())} if mask is not None and not mask.all() else {})
        documents = _distinct(self.selection.read(unit, dropped, progress), mask)
        writers = write_shards(
            split_documents(documents, self.valid_fraction),
            load_encoder(self.tokenizer, self.is_fast),
            self.end_id,
            self.dtype,
            self.folder / f"unit-{key}",
        )
        lengths = np.concatenate([writer.lengths for writer in writers.values()])
        powers = np.bincount(np.frexp(lengths)[1] - 1)  # exact: a length is a whole number
        record = UnitRecord(
            source=unit.source,
            shards={split: shard for split, writer in writers.items() if (shard := writer.close())},
            lengths={str(1 << power): int(count) for power, count in enumerate(powers) if count},
            dropped=dict(dropped),
        )
        flush(self.folder)
        replace_file(_record_file(self.folder, key), record.model_dump_json())


def _record_file(folder: Path, key: str) -> Path:
    return folder.parent / "units" / f"{key}.json"


def finished_units(folder: Path, keys: list[str]) -> set[str]:
    """Those of `keys` that an earlier call has finished; the files of all others are removed."""
    order = folder.parent / "order.json"
    units = folder.parent / "units"
    if order.exists() and json.loads(order.read_text()) != keys:  # names were given to the shards of another input
        for file in [*units.iterdir(), *folder.iterdir(), order]:
            file.unlink()
    found = {file.stem for file in units.glob("*.json")}
    for key in found - set(keys):
        (units / f"{key}.json").unlink()
    for file in folder.glob("unit-*"):
        if file.name.split("-")[1] not in found & set(keys):
            file.unlink()
    return found & set(keys)


def write_units(
    writer: UnitWriter, units: list[Unit], masks: list[np.ndarray | None], processes: int
) -> list[UnitRecord]:
    """The records of all units, of which those that are not finished are written. Raises UserError."""
    keys = [key_of(unit) for unit in units]
    finished = finished_units(writer.folder, keys)
    if finished:
        print(f"{len(finished)} of {len(units)} units are finished already", flush=True)
    todo = [one for one in zip(units, keys, masks, strict=True) if one[1] not in finished]
    run_all(writer.write, todo, [unit.size for unit, *_ in todo], "tokenising", processes)
    replace_file(writer.folder.parent / "order.json", json.dumps(keys))
    files = [_record_file(writer.folder, key) for key in keys]
    return [validate(UnitRecord, read_json(file), str(file)) for file in files]


def assemble(folder: Path, records: list[UnitRecord], tokenizer: Tokenizer, end_id: int) -> CorpusRecord:
    """Number the shards of all units and write the record of the corpus. Raises UserError where there is no text."""
    dropped = sum((Counter(record.dropped) for record in records), Counter())
    if not any("train" in record.shards for record in records):
        shutil.rmtree(folder.parent / "units")
        why = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        raise UserError(
            f"the corpus is empty: no document holds any text{f' ({why})' if why else ''}; give one that does."
        )
    shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
    for record in records:
        for split, shard in record.shards.items():
            name = f"{split}-{len(shards[split]):05}"
            for suffix in (".bin", ".idx"):
                with suppress(FileNotFoundError):  # renamed before a run was killed
                    (folder / f"{shard.name}{suffix}").rename(folder / f"{name}{suffix}")
            shards[split].append(shard.model_copy(update={"name": name}))
    return complete(
        folder,
        tokenizer,
        end_id,
        shards,
        sources=[_source(name, records) for name in dict.fromkeys(record.source for record in records)],
        lengths=_sorted(sum((Counter(record.lengths) for record in records), Counter())),
    )


def _source(name: str, records: list[UnitRecord]) -> SourceRecord:
    own = [record for record in records if record.source == name]
    shards = [shard for record in own for shard in record.shards.values()]
    return SourceRecord(
        name=name,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes or 0 for shard in shards),
        dropped=dict(sorted(sum((Counter(record.dropped) for record in own), Counter()).items())),
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {key: counts[key] for key in sorted(counts, key=int)}
