"""Token files, memory-mapped and checked: the shards of a prepared split, or one .bin/.idx pair made elsewhere.

PREFIX.bin has the tokens one after another, PREFIX.idx the place of each document.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from megamoe.config.model import validate
from megamoe.data.corpus_record import ShardRecord, SplitRecord, read_record
from megamoe.data.index_file import IndexFile
from megamoe.data.source import Sample
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import check_regular, read_json

SCAN = 1 << 27  # of tokens without a record, those checked before a run starts; each sample is checked too
SCAN_PIECE = 1 << 20  # tokens checked at a time
OPEN = 16  # shards of a corpus that are kept open, each with two descriptors


class Shard:
    """An open .bin/.idx pair."""

    def __init__(self, prefix: Path, record: ShardRecord | None):
        """Raises UserError for missing, empty or mismatched files."""
        self.prefix = prefix
        self.index = self._open_index()
        if record and self.index.num_tokens != record.tokens:
            raise UserError(
                f"{prefix}.bin has {self.index.num_tokens} tokens, not the {record.tokens} of its record; prepare the "
                "corpus again."
            )

    def _open_index(self) -> IndexFile:
        bin_path, idx_path = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        missing = [str(path) for path in (bin_path, idx_path) if not path.exists()]
        if missing:
            raise UserError(
                f"there is no {' and no '.join(missing)}; give a folder that megamoe prepare has made, or the "
                "prefix of a .bin/.idx pair."
            )
        return IndexFile(idx_path, bin_path, check_regular(bin_path, "a .bin/.idx pair"))

    @cached_property
    def tokens(self) -> np.ndarray:
        """(num_tokens,), in the file's own type."""
        with open(f"{self.prefix}.bin", "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), self.index.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from `start` on and before `stop`."""
        return self.tokens[start:stop]


class TokenCorpus:
    """The tokens of a split as one sequence, cut into samples of seq_len tokens."""

    def __init__(
        self,
        prefix: Path,
        seq_len: int,
        vocab_size: int,
        scan: bool = True,
        open_shard: Callable[[Path, ShardRecord], Shard] = Shard,
    ):
        """Raises UserError for missing, empty or mismatched files, under one sample, or ids beyond the vocabulary.

        Args:
            prefix: of a .bin/.idx pair, or of a prepared split's shards.
            scan: look at all files, and check the first SCAN tokens of those without a record; of the ranks of a host,
                one needs to.
            open_shard: by prefix and record; by default as local files.
        """
        self.prefix = prefix
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.record = split_record(prefix)
        shards = self.record.shards if self.record else []

        def open_number(number: int) -> Shard:
            return open_shard(prefix.with_name(shards[number].name), shards[number]) if shards else Shard(prefix, None)

        self._shard = lru_cache(OPEN)(open_number)
        self._ends = np.cumsum([one.tokens for one in shards] or [self._shard(0).index.num_tokens])
        self.num_tokens = int(self._ends[-1])
        self.num_samples = (self.num_tokens - 1) // seq_len
        if self.num_samples < 1:
            raise UserError(
                f"corpus {prefix} has {self.num_tokens} tokens, less than one sample of {seq_len} + 1; "
                "add text, lower --seq_len, or, for held-out text, prepare the corpus with --valid_fraction 0."
            )
        if shards:
            self._check_id(max(one.largest_id for one in shards))
        if scan:
            for number in range(len(self._ends)):
                self._shard(number)
            for start in range(0, 0 if shards else min(self.num_tokens, SCAN), SCAN_PIECE):
                self.read(start, min(start + SCAN_PIECE, SCAN, self.num_tokens))

    @cached_property
    def fingerprint(self) -> str:
        """Of all tokens and borders of documents; without a record, of the length and the beginning of both files."""
        if self.record:
            return self.record.fingerprint
        digest = hashlib.sha256(b"%d" % self.num_tokens)
        for suffix in (".bin", ".idx"):
            with open(f"{self.prefix}{suffix}", "rb") as file:
                digest.update(file.read(1 << 20))
        return digest.hexdigest()

    def sample(self, index: int, ahead: int = 0) -> Sample:
        """The sample of that number."""
        start, stop = index * self.seq_len, (index + 1) * self.seq_len
        return Sample(*self.ids_and_labels(start, stop, ahead), self.starts(start + 1, stop) - start)

    def ids_and_labels(self, start: int, stop: int, ahead: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The ids from `start` on and before `stop`, and those that follow each; then as many of `ahead` more as the
        document of the last one has. int64."""
        begins = self.starts(stop, stop + ahead)
        end = min([stop + 1 + ahead, self.num_tokens, *(begins[:1] + 1)])
        ids = self.read(start, end).astype(np.int64)
        return ids[: stop - start], ids[1:].copy()

    def documents(self) -> Iterator[np.ndarray]:
        """Token ids of each document, in the file's own type."""
        for shard, base, _, size in self._parts(0, self.num_tokens):
            for start, stop in itertools.pairwise([*shard.index.starts(0, size).tolist(), size]):
                yield self.read(base + start, base + stop)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Places from `start` on and before `stop` at which a document begins: at its first token, or at the
        end-of-text before it where the record says so."""
        before = int(self.record is not None and self.record.end_opens_next)
        parts = self._parts(start + before, min(stop + before, self.num_tokens))
        found = [base + shard.index.starts(low, high) - before for shard, base, low, high in parts]
        return np.concatenate(found or [np.zeros(0, np.int64)])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """(shard, place of its first token, start and stop in it) of each shard from `start` to `stop`."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[number])
            base = int(self._ends[number - 1]) if number else 0
            yield self._shard(number), base, start - base, min(stop, end) - base
            start, number = end, number + 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Checked ids, in the file's own type."""
        parts = [shard.read(low, high) for shard, _, low, high in self._parts(start, stop)]
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not self.record and (ids.max() >= self.vocab_size or ids.min() < 0):
            self._check_id(int(ids[(ids >= self.vocab_size) | (ids < 0)][0]))
        return ids

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise UserError(
                f"corpus {self.prefix} holds token id {token_id}, beyond the model's vocabulary of {self.vocab_size}; "
                "use the tokenizer that the preset is sized for, or raise the preset's vocab_size."
            )


def corpus_prefix(path: str, split: str) -> Path:
    """PATH/split for a prepared folder; for a .bin/.idx pair its prefix, which PATH is, or is with either ending."""
    given = Path(path)
    if given.is_dir():
        return given / split
    return given.with_suffix("") if given.suffix in (".bin", ".idx") else given


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder has that split. Raises UserError."""
    record = read_record(folder)
    return split in record.splits if record else (folder / f"{split}.idx").is_file()


def files_of(prefix: Path) -> list[Path]:
    """The files of a .bin/.idx pair, or of a prepared split's shards. Raises UserError."""
    record = split_record(prefix)
    names = [shard.name for shard in record.shards] if record else [prefix.name]
    return [prefix.with_name(name + suffix) for name in names for suffix in (".bin", ".idx")]


def split_record(prefix: Path) -> SplitRecord | None:
    """That of a split of a prepared folder, or of a pair that `megamoe check` has read; None where there is
    none. Raises UserError."""
    own = Path(f"{prefix}.json")
    if own.exists():
        return validate(SplitRecord, read_json(own), str(own))
    record = read_record(prefix.parent)
    if record and prefix.name == "valid" and prefix.name not in record.splits:
        raise UserError(f"{prefix.parent} has no held-out split; prepare it with a --valid_fraction above 0.")
    return record.splits.get(prefix.name) if record else None
