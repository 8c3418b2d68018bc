"""A corpus from units of input, by any number of processes, and on from where a run of it was killed.

What is finished is kept in .NAME.partial next to the output: settings.json, tokenizer.json, the shards of each unit
and, written last, its record. A unit's files depend on the settings and its input alone.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megamoe.config.model import JsonModel, validate
from megamoe.data.corpus import SPLITS, complete, split_documents, write_shards
from megamoe.data.corpus_record import CorpusRecord, ShardRecord, SourceRecord
from megamoe.data.encoder import load_encoder
from megamoe.data.index_file import token_dtype
from megamoe.data.inputs import Unit
from megamoe.data.selection import Selection
from megamoe.data.tokenizer import vocabulary_of
from megamoe.utils.disk import PARTIAL, check_absent, flush, replace_file
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json

SAMPLE = 256 << 20  # characters of the training split that a tokenizer is trained on


class UnitRecord(JsonModel):
    """What came of a unit."""

    source: str
    shards: dict[str, ShardRecord]  # by split
    lengths: dict[str, int]
    dropped: dict[str, int]


@contextmanager
def partial_corpus(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder that becomes `out` at the end of the block, .NAME.partial/NAME. After an error it stays if a unit is
    finished. Raises UserError for `out`, for other settings than it was begun with, or while another process writes."""
    check_absent(out)
    work = out.with_name(f".{out.name}{PARTIAL}")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being written by another process; wait, or choose another output.") from None
        folder = _begun(work, work / out.name, settings)
        try:
            yield folder
            flush(folder)
            check_absent(out)
            folder.rename(out)
            flush(out.parent)
        finally:
            if not folder.exists() or not list(work.glob("*-record.json")):
                shutil.rmtree(work)


def _begun(work: Path, folder: Path, settings: dict[str, Any]) -> Path:
    file = work / "settings.json"
    if not folder.exists():  # nothing is begun, or a run was killed after it renamed the folder
        for path in work.glob("*.json"):
            path.unlink()
        replace_file(file, json.dumps(settings))
        folder.mkdir()
    found = read_json(file)
    differing = [name for name, value in settings.items() if found[name] != value]
    if differing:
        raise UserError(
            f"{work} holds an unfinished corpus of another {', '.join(differing)}; give the same again, or remove that "
            "folder."
        )
    return folder


def kept_documents(unit: Unit, mask: np.ndarray | None, selection: Selection, dropped: Counter[str]) -> Iterator[str]:
    """The documents of a unit that `mask` keeps, all by default; `dropped` counts the others by reason."""
    for number, text in enumerate(selection.read(unit, dropped)):
        if mask is None or mask[number]:
            yield text
        else:
            dropped["duplicate"] += 1


def training_texts(
    units: list[Unit], masks: list[np.ndarray | None], selection: Selection, valid_fraction: float
) -> Iterator[str]:
    """Documents of the training split to train a tokenizer on: all, or of more than SAMPLE the first of each unit."""
    share = SAMPLE / sum(unit.size for unit in units)
    for unit, mask in zip(units, masks, strict=True):
        left = unit.size * share if share < 1 else float("inf")
        for split, text in split_documents(kept_documents(unit, mask, selection, Counter()), valid_fraction):
            if split == "train":
                yield text
                left -= len(text)
            if left <= 0:
                break


class UnitWriter(NamedTuple):
    """Turns units into shards, in any process."""

    folder: Path  # of `partial_corpus`
    tokenizer: str  # as JSON
    is_fast: bool
    end_id: int
    valid_fraction: float
    selection: Selection

    def write(self, number: int, unit: Unit, mask: np.ndarray | None) -> None:
        """Write a unit's shards, then its record.

        Args:
            mask: (documents,), which of them are kept; None for all.
        """
        prefix = self.folder / f"unit-{number}"
        for left in self.folder.glob(f"{prefix.name}-*"):
            left.unlink()
        dropped: Counter[str] = Counter()
        documents = kept_documents(unit, mask, self.selection, dropped)
        encode = load_encoder(self.tokenizer, self.is_fast)
        dtype = token_dtype(vocabulary_of(encode.tokenizer))
        pairs = split_documents(documents, self.valid_fraction)
        writers = write_shards(pairs, encode, self.end_id, dtype, prefix, unit.name)
        lengths = Counter(1 << int(n).bit_length() - 1 for writer in writers.values() for n in writer.lengths)
        record = UnitRecord(
            source=unit.source,
            shards={split: shard for split, writer in writers.items() if (shard := writer.close())},
            lengths={str(length): lengths[length] for length in sorted(lengths)},
            dropped=dropped,
        )
        flush(self.folder)
        replace_file(self.record_file(number), record.model_dump_json())

    def record_file(self, number: int) -> Path:
        """Of a unit; it is there if the unit is finished."""
        return self.folder.with_name(f"{number}-record.json")


def assemble(writer: UnitWriter, num_units: int, tokenizer: Tokenizer) -> CorpusRecord:
    """Number the shards of all units and write the record of the corpus. Raises UserError where there is no text."""
    files = [writer.record_file(number) for number in range(num_units)]
    records = [validate(UnitRecord, read_json(file), str(file)) for file in files]
    sources = [_source(name, records) for name in dict.fromkeys(record.source for record in records)]
    shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
    for record in records:
        for split, shard in record.shards.items():
            name = f"{split}-{len(shards[split]):05}"
            for suffix in (".bin", ".idx", ".sums"):
                with suppress(FileNotFoundError):  # renamed before a run was killed
                    (writer.folder / f"{shard.name}{suffix}").rename(writer.folder / f"{name}{suffix}")
            shards[split].append(shard.model_copy(update={"name": name}))
    if not shards["train"]:
        for file in files:  # nothing is worth keeping
            file.unlink()
        why = ", ".join(f"{reason}: {count}" for source in sources for reason, count in source.dropped.items())
        raise UserError(f"the corpus is empty: no document is left (dropped: {why or 'none'}); give one with text.")
    lengths = _sum(record.lengths for record in records)
    return complete(writer.folder, tokenizer, writer.end_id, shards, sources=sources, lengths=lengths)


def _source(name: str, records: list[UnitRecord]) -> SourceRecord:
    own = [record for record in records if record.source == name]
    shards = [shard for record in own for shard in record.shards.values()]
    return SourceRecord(
        name=name,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes or 0 for shard in shards),
        dropped=_sum(record.dropped for record in own),
    )


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items(), key=lambda item: (len(item[0]), item[0])))
