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
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tqdm import tqdm

from megamoe.config.model import JsonModel, validate
from megamoe.data.corpus_record import CorpusRecord, ShardRecord, SourceRecord, totals, write_corpus_record
from megamoe.data.encoder import load_encoder
from megamoe.data.inputs import Unit
from megamoe.data.selection import SPLITS, Selection, split_documents
from megamoe.data.shard_writer import ShardWriter
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
    folder = work / out.name
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being written by another process; wait, or choose another output.") from None
        _begin(work, folder, settings)
        try:
            yield folder
            flush(folder)
            check_absent(out)
            folder.rename(out)
            flush(out.parent)
        except OSError as error:
            error.filename = error.filename or str(out)  # a write to a full disk does not say where
            raise
        finally:
            if not folder.exists() or not list(work.glob("*-record.json")):
                shutil.rmtree(work)


def _begin(work: Path, folder: Path, settings: dict[str, Any]) -> None:
    file = work / "settings.json"
    if not folder.exists():  # nothing is begun, or a run was killed after it renamed the folder
        for path in work.glob("*.json"):
            path.unlink()
        replace_file(file, json.dumps(settings))
        folder.mkdir()
    found = read_json(file)
    if differing := [name for name, value in settings.items() if found.get(name) != value]:
        raise UserError(
            f"{work} holds an unfinished corpus of another {', '.join(differing)}; give the same again, or remove that "
            "folder."
        )


def training_texts(units: list[Unit], selection: Selection) -> Iterator[str]:
    """Documents of the training split to train a tokenizer on: all, or of more than SAMPLE the first of each unit."""
    share = SAMPLE / max(sum(unit.size for unit in units), 1)
    for unit in tqdm(units, desc="training the tokenizer", unit=" units"):
        left = unit.size * share if share < 1 else float("inf")
        for split, text in split_documents(selection.read(unit), selection.valid_fraction):
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
    selection: Selection

    def write(self, unit: Unit) -> None:
        """Write a unit's shards, then its record."""
        for left in self.folder.glob(f"*-{unit.number:05}.*"):
            left.unlink()
        encode = load_encoder(self.tokenizer, self.is_fast)
        prefixes = {split: self.folder / f"{split}-{unit.number:05}" for split in SPLITS}
        writers = {split: ShardWriter(prefix, encode, self.end_id, unit.name) for split, prefix in prefixes.items()}
        dropped: Counter[str] = Counter()
        documents = self.selection.read(unit, dropped)
        for split, document in split_documents(documents, self.selection.valid_fraction):
            writers[split].add(document)
        shards = {split: shard for split, writer in writers.items() if (shard := writer.close())}
        lengths = Counter(str(1 << int(n).bit_length() - 1) for writer in writers.values() for n in writer.lengths)
        record = UnitRecord(source=unit.source, shards=shards, lengths=lengths, dropped=dropped)
        flush(self.folder)
        replace_file(self.record_file(unit), record.model_dump_json())

    def record_file(self, unit: Unit) -> Path:
        """It is there if the unit is finished."""
        return self.folder.with_name(f"{unit.number}-record.json")


def assemble(writer: UnitWriter, units: list[Unit]) -> CorpusRecord:
    """Write the record of the corpus, from those of its units. Raises UserError where there is no text."""
    files = [writer.record_file(unit) for unit in units]
    records = [validate(UnitRecord, read_json(file), str(file)) for file in files]
    sources = [_source(name, records) for name in dict.fromkeys(record.source for record in records)]
    shards = {split: [record.shards[split] for record in records if split in record.shards] for split in SPLITS}
    if not shards["train"]:
        for file in files:  # nothing is worth keeping
            file.unlink()
        why = ", ".join(f"{reason}: {count}" for source in sources for reason, count in source.dropped.items())
        raise UserError(f"the corpus is empty: no document is left (dropped: {why or 'none'}); give one with text.")
    lengths = _sum(record.lengths for record in records)
    report = {"sources": sources, "lengths": dict(sorted(lengths.items(), key=lambda item: int(item[0])))}
    return write_corpus_record(writer.folder, Tokenizer.from_str(writer.tokenizer), writer.end_id, shards, **report)


def _source(name: str, records: list[UnitRecord]) -> SourceRecord:
    own = [record for record in records if record.source == name]
    shards = [shard for record in own for shard in record.shards.values()]
    return SourceRecord(name=name, **totals(shards), dropped=_sum(record.dropped for record in own))


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter())
