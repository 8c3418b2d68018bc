"""Best-fit packing (Ding et al., arXiv 2404.10830): no document is cut that fits into a sample. A longer one fills
samples alone, and its rest is packed like a document."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from megamoe.data.source import Sample
from megamoe.data.token_files import TokenCorpus
from megamoe.utils.disk import flush


class PackedCorpus:
    """A corpus in samples of whole documents, a function of it and seq_len alone. Last positions may be unused."""

    def __init__(self, corpus: TokenCorpus, writes: bool):
        """
        Args:
            writes: leave the index next to the corpus, where that can be written; of the ranks of a host, one needs to.
        """
        self.seq_len = corpus.seq_len
        self.fingerprint = f"best_fit {corpus.fingerprint}"
        self._corpus = corpus
        self._index = _load_index(corpus, writes)
        self.num_samples = int(self._index[0]) - 1

    @property
    def unused(self) -> float:
        """The share of positions without a token. Reads the whole index."""
        used = int((self._index[self.num_samples + 1 :] % (self.seq_len + 1)).sum())
        return 1 - used / (self.num_samples * self.seq_len)

    def sample(self, index: int, ahead: int = 0) -> Sample:
        """The sample of that number. All pieces but those that fill it end with their document, and so do labels."""
        begin, end = self._index[index : index + 2]
        starts, lengths = np.divmod(self._index[begin:end], self.seq_len + 1)
        pieces = [self._corpus.ids_and_labels(*one, ahead) for one in zip(starts, starts + lengths, strict=True)]
        ids, labels = map(np.concatenate, zip(*pieces, strict=True))
        return Sample(ids, labels, np.cumsum(lengths[:-1]))


def _load_index(corpus: TokenCorpus, writes: bool) -> np.ndarray:
    """(1 + samples + pieces,) int64: where in it each sample's pieces begin, and its own end; then the pieces, each its
    first token * (seq_len + 1) + its length. Memory-mapped, or computed where there is no file."""
    name = f"{corpus.prefix.name}.best_fit-{corpus.seq_len}-{corpus.fingerprint[:16]}.npy"
    file = corpus.prefix.with_name(name)
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(file, mmap_mode="r")
    index = _make_index(corpus)
    if writes:
        # A corpus may be read-only. A link never replaces a file that another host has mapped.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=f".{name}", dir=file.parent) as folder:
            partial = Path(folder) / name
            np.save(partial, index)
            flush(partial)
            os.link(partial, file)
    return index


def _make_index(corpus: TokenCorpus) -> np.ndarray:
    last = corpus.num_tokens - 1  # which is only a label
    bounds = np.concatenate([[0], corpus.starts(0, last), [last]])
    counts = -(-np.diff(bounds) // corpus.seq_len)  # pieces of each document
    earlier = np.repeat(np.cumsum(counts) - counts, counts)  # of the documents before a piece's own
    starts = np.repeat(bounds[:-1], counts) + (np.arange(len(earlier)) - earlier) * corpus.seq_len
    lengths = np.minimum(np.repeat(bounds[1:], counts) - starts, corpus.seq_len)
    bins = best_fit(lengths, corpus.seq_len)
    ends = np.concatenate([[0], np.cumsum(np.bincount(bins))])
    pieces = (starts * (corpus.seq_len + 1) + lengths)[np.argsort(bins, kind="stable")]
    return np.concatenate([len(ends) + ends, pieces])


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each of N items of 1 to `capacity`: from the longest on, each goes into the fullest that has room.

    Bins with the same room are filled together, so there are some `capacity` * log(`capacity`) steps for any N.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    groups = [*([] for _ in range(capacity)), [np.arange(len(lengths))]]  # bins by their room; the last are new
    has_bins = np.arange(capacity + 1) == capacity
    counts = np.bincount(lengths)
    first = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = first + int(counts[length])
        while first < end:
            room = length + int(has_bins[length:].argmax())
            group = groups[room].pop()
            each = min(room // length, end - first)  # the bin of one item is the fullest for the next
            taken, rest = np.split(group, [(end - first) // each])
            bins[order[first : first + each * len(taken)]] = np.repeat(taken, each)
            first += each * len(taken)
            groups[room - each * length].append(taken)
            groups[room] += [rest] if len(rest) else []
            has_bins[[room - each * length, room]] = True, bool(groups[room])
    return bins
