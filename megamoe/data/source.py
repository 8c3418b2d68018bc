"""What a run trains on: the protocol of its samples. `--data MODULE:NAME` names a source of your own."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


def is_remote(path: str) -> bool:
    """Whether a path is one of an object store, such as s3://bucket/folder."""
    return "://" in path


class Sample(NamedTuple):
    """One row of a batch."""

    # (seq_len + 1 + ahead,) int64: the ids that the model reads, then those that only count as labels. Where there are
    # fewer, the rest of the row is padding.
    ids: np.ndarray
    starts: np.ndarray  # rising places in `ids`, above 0, at which a document begins; int64


class DataSource(Protocol):
    """Samples by number. All ranks have the same ones, and `sample` is a pure function: it is called on threads, in
    any order, and again after a resume."""

    seq_len: int  # tokens of a sample that the model reads
    num_samples: int

    @property
    def fingerprint(self) -> str:
        """Of the data: a run is resumed only on data with the same."""

    def sample(self, index: int, ahead: int = 0) -> Sample:
        """The sample of that number.

        Args:
            ahead: ids beyond the one that follows the last position, for a loss on tokens further ahead.
        """
