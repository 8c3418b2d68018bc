"""Megatron's .bin/.idx files: the tokens of a corpus, memory-mapped and checked.

PREFIX.bin has the tokens one after another, PREFIX.idx the header, the length and the place of each document.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from megamoe.config.model import JsonModel, validate
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import check_regular, read_json

IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, document starts
IDX_START = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little")  # magic and the version, of which there is no other
# What each dtype code may mean. DeepSpeed's table and Megatron-LM's agree up to 5; 8 is uint64 in one and uint16 in the
# other, so the size of the .bin decides.
IDX_DTYPES: dict[int, tuple[type, ...]] = {
    1: (np.uint8,), 2: (np.int8,), 3: (np.int16,), 4: (np.int32,), 5: (np.int64,),
    6: (np.uint16,), 7: (np.uint32,), 8: (np.uint64, np.uint16),
}  # fmt: skip
SCAN = 1 << 27  # tokens whose ids are checked before a run starts; each batch is checked too
SCAN_PIECE = 1 << 20  # tokens checked at a time


class TokenCorpus:
    """The tokens of PREFIX.bin/.idx as one sequence, cut into samples of seq_len + 1 tokens that share their ends."""

    def __init__(self, prefix: Path, seq_len: int, vocab_size: int, scan: bool = True):
        """Raises UserError for missing, empty or mismatched files, under one sample, or ids beyond the vocabulary.

        Args:
            scan: read the first SCAN tokens and check their ids; of the ranks of a host, one needs to.
        """
        self.prefix = prefix
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self._tokens = np.memmap(f"{prefix}.bin", dtype=_checked_dtype(prefix), mode="r")
        self.num_tokens = len(self._tokens)
        self.num_samples = (self.num_tokens - 1) // seq_len
        if self.num_samples < 1:
            raise UserError(
                f"corpus {prefix} has {self.num_tokens} tokens, less than one sample of {seq_len} + 1; "
                "add text, lower --seq_len, or, for held-out text, prepare the corpus with --valid_fraction 0."
            )
        stop = min(self.num_tokens, SCAN) if scan else 0
        for start in range(0, stop, SCAN_PIECE):
            self._read(start, min(start + SCAN_PIECE, stop))

    def sample(self, index: int, ahead: int = 0) -> np.ndarray:
        """Token ids (seq_len + 1 + ahead,) int64 of sample `index`; fewer where the corpus ends before."""
        start = index * self.seq_len
        return self._read(start, start + self.seq_len + 1 + ahead).astype(np.int64)

    def documents(self) -> Iterator[np.ndarray]:
        """Token ids of each document, in the file's own type."""
        with open(f"{self.prefix}.idx", "rb") as stream:
            _, _, _, items, starts = IDX_HEADER.unpack(stream.read(IDX_HEADER.size))
            sizes = np.fromfile(stream, np.int32, items)
            stream.seek(items * 8, os.SEEK_CUR)
            first_items = np.fromfile(stream, np.int64, starts)
        ends = np.concatenate(([0], sizes.cumsum(dtype=np.int64)))[first_items]
        for start, end in itertools.pairwise(ends.tolist()):
            if end > start:
                yield self._read(start, end)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Checked ids, in the file's own type."""
        ids = self._tokens[start:stop]
        if ids.max() >= self.vocab_size or ids.min() < 0:
            bad = int(ids[(ids >= self.vocab_size) | (ids < 0)][0])
            raise UserError(
                f"corpus {self.prefix} holds token id {bad}, beyond the model's vocabulary of {self.vocab_size}; "
                "use the tokenizer that the preset is sized for, or raise the preset's vocab_size."
            )
        return ids


def _checked_dtype(prefix: Path) -> type:
    """The numpy type of the tokens, after checking that the .idx is complete and describes the .bin."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [str(path) for path in (bin_path, idx_path) if not path.exists()]
    if len(missing) == 2 and prefix.name == "valid" and prefix.with_name("train.idx").exists():
        raise UserError(f"{prefix.parent} has no held-out split; prepare it with a --valid_fraction above 0.")
    if missing:
        raise UserError(
            f"there is no {' and no '.join(missing)}; give a folder that tools/prepare_data.py has made, or the prefix "
            "of a .bin/.idx pair."
        )
    bin_size, idx_size = (check_regular(path, "a .bin/.idx pair") for path in (bin_path, idx_path))
    with open(idx_path, "rb") as stream:
        header = stream.read(IDX_HEADER.size)
        if len(header) < IDX_HEADER.size or not header.startswith(IDX_START):
            raise UserError(f"{idx_path} is not a Megatron index of version 1; prepare the corpus again.")
        _, _, dtype_code, items, documents = IDX_HEADER.unpack(header)
        expected = IDX_HEADER.size + items * (4 + 8) + documents * 8
        if idx_size != expected:
            raise UserError(
                f"{idx_path} is {idx_size} bytes, not the {expected} of its {items} items; prepare the corpus again."
            )
        if not items or not bin_size:
            raise UserError(f"corpus {prefix} is empty; give one with text in it.")
        stream.seek(IDX_HEADER.size + (items - 1) * 4)
        (last_size,) = struct.unpack("<i", stream.read(4))
        stream.seek(IDX_HEADER.size + items * 4 + (items - 1) * 8)
        (last_start,) = struct.unpack("<q", stream.read(8))
    candidates = IDX_DTYPES.get(dtype_code, ())
    if not candidates:
        raise UserError(f"{idx_path} has dtype code {dtype_code}, which is not one of integers; prepare it again.")
    for dtype in candidates:
        width = np.dtype(dtype).itemsize
        if bin_size == last_start + last_size * width and min(last_start, last_size) >= 0 and not bin_size % width:
            return dtype
    raise UserError(
        f"{idx_path} describes {last_start + last_size * np.dtype(candidates[0]).itemsize} bytes of whole tokens, but "
        f"{bin_path} has {bin_size}; they belong to different corpora: prepare it again."
    )


def corpus_prefix(path: str, split: str) -> Path:
    """PATH/split for a prepared folder; for a .bin/.idx pair its prefix, which PATH is, or is with either ending."""
    given = Path(path)
    if given.is_dir():
        return given / split
    return given.with_suffix("") if given.suffix in (".bin", ".idx") else given


class Counts(JsonModel):
    """What corpus.json has of a split."""

    documents: int = 0
    tokens: int = Field(gt=0)
    bytes: int = Field(gt=0)


def split_counts(prefix: Path) -> Counts | None:
    """Those of a split of a prepared folder; None for corpora prepared elsewhere. Raises UserError."""
    file = prefix.parent / "corpus.json"
    counts = read_json(file).get(prefix.name) if file.exists() else None
    return None if counts is None else validate(Counts, counts, f"{file}: {prefix.name}")
