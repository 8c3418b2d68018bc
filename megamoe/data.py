"""Tokens to batches: memory-mapped corpora, and the order of samples as a pure function of (seed, position).

Position p of a run is the p-th sample it trains on, whatever the number of ranks. Which corpus and which sample that
is, is computed, not stored: a keyed permutation needs no index, so a trillion tokens cost no memory and a resumed run
goes on exactly where it was.
"""

from __future__ import annotations

import bisect
import itertools
import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megamoe.config import UserError

MIX_BLOCK = 4096  # positions in which every corpus gets its exact share; weights are rounded to 1 / MIX_BLOCK
IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, document starts
IDX_MAGIC = b"MMIDIDX\x00\x00"
# What each dtype code may mean. DeepSpeed's table and Megatron-LM's agree up to 5; 8 is uint64 in one and uint16 in the
# other, so the size of the .bin decides.
IDX_DTYPES: dict[int, tuple[type, ...]] = {
    1: (np.uint8,), 2: (np.int8,), 3: (np.int16,), 4: (np.int32,), 5: (np.int64,),
    6: (np.uint16,), 7: (np.uint32,), 8: (np.uint64, np.uint16),
}  # fmt: skip
SCAN = 1 << 27  # tokens whose ids are checked before a run starts; each batch is checked too
MASK64 = (1 << 64) - 1


class TokenCorpus:
    """The tokens of PREFIX.bin/.idx as one sequence, cut into samples of seq_len + 1 tokens that share their ends."""

    def __init__(self, prefix: Path, seq_len: int, vocab_size: int):
        """Raises UserError for missing, empty or mismatched files, under one sample, or ids beyond the vocabulary."""
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
        self._read(0, min(self.num_tokens, SCAN))

    def sample(self, index: int) -> np.ndarray:
        """Token ids (seq_len + 1,) int64 of sample `index`."""
        return self._read(index * self.seq_len, self.seq_len + 1)

    def _read(self, start: int, length: int) -> np.ndarray:
        ids = self._tokens[start : start + length]
        if ids.max() >= self.vocab_size or ids.min() < 0:
            bad = int(ids[(ids >= self.vocab_size) | (ids < 0)][0])
            raise UserError(
                f"corpus {self.prefix} holds token id {bad}, beyond the model's vocabulary of {self.vocab_size}; "
                "use the tokenizer that the preset is sized for, or raise the preset's vocab_size."
            )
        return ids.astype(np.int64)


def _checked_dtype(prefix: Path) -> type:
    """The numpy type of the tokens, after checking that the .idx is whole and describes the .bin."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        raise UserError(f"corpus file {' and '.join(missing)} does not exist; make it with tools/prepare_data.py.")
    with open(idx_path, "rb") as stream:
        header = stream.read(IDX_HEADER.size)
        if len(header) < IDX_HEADER.size or not header.startswith(IDX_MAGIC):
            raise UserError(f"{idx_path} is not a Megatron index; prepare the corpus again.")
        _, _, dtype_code, items, documents = IDX_HEADER.unpack(header)
        expected = IDX_HEADER.size + items * (4 + 8) + documents * 8
        if idx_path.stat().st_size != expected:
            raise UserError(
                f"{idx_path} is {idx_path.stat().st_size} bytes, not the {expected} of its {items} items; "
                "prepare the corpus again."
            )
        if not items or not bin_path.stat().st_size:
            raise UserError(f"corpus {prefix} is empty; give one with text in it.")
        stream.seek(IDX_HEADER.size + (items - 1) * 4)
        (last_size,) = struct.unpack("<i", stream.read(4))
        stream.seek(IDX_HEADER.size + items * 4 + (items - 1) * 8)
        (last_start,) = struct.unpack("<q", stream.read(8))
    candidates = IDX_DTYPES.get(dtype_code, ())
    if not candidates:
        raise UserError(f"{idx_path} has dtype code {dtype_code}, which is none of whole numbers; prepare it again.")
    described = [last_start + last_size * np.dtype(candidate).itemsize for candidate in candidates]
    if bin_path.stat().st_size not in described:
        raise UserError(
            f"{idx_path} describes {described[0]} bytes, but {bin_path} has {bin_path.stat().st_size}; "
            "they are not of one corpus: prepare it again."
        )
    return candidates[described.index(bin_path.stat().st_size)]


def corpus_prefix(path: str, split: str) -> Path:
    """PATH/split for a prepared folder, or PATH itself where it is the prefix of a .bin/.idx pair."""
    return Path(path) / split if Path(path).is_dir() else Path(path)


def corpus_counts(path: str) -> dict[str, dict[str, int]] | None:
    """Documents, tokens and bytes by split of a prepared folder; None for corpora prepared elsewhere."""
    file = Path(path) / "corpus.json"
    return json.loads(file.read_text()) if file.is_file() else None


# --- order ----------------------------------------------------------------------------------------------------------


def _mix(*values: int) -> int:
    """A 64-bit hash of integers: the finalizer of splitmix64 (Steele et al., 2014), chained."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


def permute(index: int, size: int, *key: int) -> int:
    """Where a pseudo-random permutation of range(size), chosen by `key`, sends `index`. O(1) time and memory.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002).
    """
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    mixed_key = _mix(*key)
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(mixed_key, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class SampleOrder:
    """Which sample of which corpus stands at each position of the run.

    Every block of MIX_BLOCK positions holds each corpus in proportion to its weight, in shuffled order. A corpus is
    walked in a new random order each time it has been walked through.
    """

    sizes: tuple[int, ...]  # samples in each corpus
    shares: tuple[int, ...]  # positions of each corpus in a block; they sum to MIX_BLOCK
    seed: int

    @staticmethod
    def of(sizes: list[int], weights: list[float], seed: int) -> SampleOrder:
        """Raises UserError if a weight is too small to be given one position in a block."""
        ideal = [weight / sum(weights) * MIX_BLOCK for weight in weights]
        shares = [int(share) for share in ideal]
        # Largest remainder: the positions left by rounding down go to those who lost most.
        by_loss = sorted(range(len(ideal)), key=lambda i: shares[i] - ideal[i])
        for i in by_loss[: MIX_BLOCK - sum(shares)]:
            shares[i] += 1
        for weight, share in zip(weights, shares, strict=True):
            if not share:
                raise UserError(f"data: weight {weight} is below 1/{MIX_BLOCK} of the mix; raise it or leave it out.")
        return SampleOrder(tuple(sizes), tuple(shares), seed)

    def at(self, position: int) -> tuple[int, int]:
        """(corpus, sample) at `position`, counted from 0."""
        block, slot = divmod(position, MIX_BLOCK)
        corpus, before = _mixed_block(self.shares, self.seed, block)[slot]
        epoch, index = divmod(block * self.shares[corpus] + before, self.sizes[corpus])
        return corpus, permute(index, self.sizes[corpus], self.seed, corpus, epoch)


@lru_cache(maxsize=4)  # a step reads neighbouring positions
def _mixed_block(shares: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """For each position of a block: its corpus, and how many positions of the same corpus the block has before it."""
    ends = list(itertools.accumulate(shares))
    counts = [0] * len(shares)
    places = []
    for position in range(MIX_BLOCK):
        corpus = bisect.bisect_right(ends, permute(position, MIX_BLOCK, seed, block))
        places.append((corpus, counts[corpus]))
        counts[corpus] += 1
    return places


# --- batches --------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  # input ids and labels, (micro-batch, seq_len) int64 each


class TrainData:
    """The micro-batches of a run."""

    def __init__(self, corpora: list[TokenCorpus], weights: list[float], seed: int):
        self.corpora = corpora
        self.order = SampleOrder.of([corpus.num_samples for corpus in corpora], weights, seed)

    def batch(self, first: int, count: int) -> Batch:
        """The samples at positions first .. first + count - 1."""
        places = [self.order.at(position) for position in range(first, first + count)]
        return _to_batch([self.corpora[corpus].sample(index) for corpus, index in places])


def eval_batch(corpus: TokenCorpus, first: int, count: int, limit: int) -> Batch:
    """Held-out samples first .. first + count - 1 in file order; those from `limit` on have no labels (-100).

    Every rank must run equally many forward passes, so the last ones are filled up with samples that do not count.
    """
    inputs, labels = _to_batch([corpus.sample(index if index < limit else 0) for index in range(first, first + count)])
    labels[max(limit - first, 0) :] = -100
    return inputs, labels


def _to_batch(samples: list[np.ndarray]) -> Batch:
    tokens = torch.from_numpy(np.stack(samples))
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()  # of their own: labels may be overwritten
