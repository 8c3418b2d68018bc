"""Best-fit packing: whole documents to samples, by best-fit decreasing (Ding et al., arXiv 2404.10830).

No document that fits into a sample is cut. A longer one fills samples alone, and its rest is packed like a document.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from pathlib import Path

import numpy as np

from megamoe.data.source import Sample
from megamoe.data.token_files import TokenCorpus
from megamoe.utils.disk import PARTIAL
from megamoe.utils.errors import UserError


class PackedCorpus:
    """A corpus whose samples hold whole documents, and at their end unused positions.

    Which ones is a function of the borders of documents and of seq_len alone, kept in a file next to the corpus. Where
    there is none, every rank computes the same.
    """

    def __init__(self, corpus: TokenCorpus, writes: bool):
        """Raises UserError where no document has two tokens.

        Args:
            writes: leave that file where the folder can be written; of the ranks of a host, one needs to.
        """
        self.seq_len = corpus.seq_len
        self.fingerprint = f"best_fit {corpus.fingerprint}"
        self._corpus = corpus
        # (1 + samples + pieces,) int64: the places in it at which each sample's pieces begin, and its own end; then the
        # pieces, each its first token * (seq_len + 1) + its length.
        self._index = _load(corpus, writes)
        self.num_samples = int(self._index[0]) - 1
        if not self.num_samples:
            raise UserError(f"corpus {corpus.prefix} has no document of two tokens to pack; give one with text in it.")

    @property
    def unused(self) -> float:
        """The share of positions without a token. Reads the whole index."""
        used = int((self._index[self.num_samples + 1 :] % (self.seq_len + 1)).sum())
        return 1 - used / (self.num_samples * self.seq_len)

    def sample(self, index: int, ahead: int = 0) -> Sample:
        """The sample of that number; that of a long document goes on in it, any other ends with its last piece."""
        begin, end = self._index[index : index + 2]
        starts, lengths = (part.tolist() for part in np.divmod(self._index[begin:end], self.seq_len + 1))
        if lengths[0] == self.seq_len:
            start, stop = starts[0], min(starts[0] + self.seq_len + 1 + ahead, self._corpus.num_tokens)
            lengths = [min([stop, *self._corpus.starts(start + 1, stop)]) - start]
        pieces = [self._corpus.read(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        return Sample(np.concatenate(pieces).astype(np.int64), np.cumsum(lengths[:-1], dtype=np.int64))


def _load(corpus: TokenCorpus, writes: bool) -> np.ndarray:
    """The index in its file, memory-mapped; computed where there is none."""
    prefix = corpus.prefix
    file = prefix.with_name(f"{prefix.name}.best_fit-{corpus.seq_len}-{corpus.fingerprint[:16]}.npy")
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(file, mmap_mode="r")
    index = _make_index(corpus)
    if writes:
        with contextlib.suppress(OSError):  # a corpus may be read-only
            _save(file, index)
            return np.load(file, mmap_mode="r")
    return index


def _save(file: Path, index: np.ndarray) -> None:
    partial = file.with_name(f"{file.name}{PARTIAL}-{os.uname().nodename}-{os.getpid()}")
    try:
        with open(partial, "xb") as stream:
            np.save(stream, index)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _make_index(corpus: TokenCorpus) -> np.ndarray:
    bounds = np.unique(np.concatenate([[0], corpus.starts(0, corpus.num_tokens), [corpus.num_tokens]]))
    counts = -(-np.diff(bounds) // corpus.seq_len)  # pieces of each document
    earlier = np.repeat(np.cumsum(counts) - counts, counts)  # of the documents before a piece's own
    starts = np.repeat(bounds[:-1], counts) + (np.arange(len(earlier)) - earlier) * corpus.seq_len
    lengths = np.minimum(np.repeat(bounds[1:], counts) - starts, corpus.seq_len)
    kept = lengths > 1  # a single token has no label; as a rest, it is one of the piece before
    starts, lengths = starts[kept], lengths[kept]
    bins = best_fit(lengths, corpus.seq_len)
    ends = np.concatenate([[0], np.cumsum(np.bincount(bins))])
    pieces = (starts * (corpus.seq_len + 1) + lengths)[np.argsort(bins, kind="stable")]
    return np.concatenate([len(ends) + ends, pieces])


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, (N,) int64: from the longest on, an item goes into the fullest bin that has room.

    Bins with the same room are filled together, so there are some `capacity` * log(`capacity`) steps for any N.

    Args:
        lengths: (N,) from 1 to `capacity`.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    groups: dict[int, list[np.ndarray]] = {}  # bins by their room
    rooms: list[int] = []  # the keys, rising

    def put(room: int, group: np.ndarray) -> None:
        if room and len(group):
            if room not in groups:
                bisect.insort(rooms, room)
            groups.setdefault(room, []).append(group)

    first = opened = 0
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = first + int(counts[length])
        while first < end:
            place = bisect.bisect_left(rooms, length)
            if place == len(rooms):
                wanted = -(-(end - first) // (capacity // length))
                put(capacity, np.arange(opened, opened + wanted))
                opened += wanted
            room = rooms[place]
            group = groups[room].pop()
            if not groups[room]:
                del groups[room], rooms[place]
            each = min(room // length, end - first)  # the bin that an item has gone into stays the fullest with room
            taken = group[: (end - first) // each]
            bins[order[first : first + each * len(taken)]] = np.repeat(taken, each)
            first += each * len(taken)
            put(room - each * length, taken)
            put(room, group[len(taken) :])
    return bins
