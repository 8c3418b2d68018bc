"""What a run trains on: the protocol of its samples. `--data MODULE:NAME` names a source of your own."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

NO_LABEL = -100  # torch's own default for `ignore_index`


def is_remote(path: str) -> bool:
    """Whether a path is one of an object store, such as s3://bucket/folder."""
    return "://" in path


class Sample(NamedTuple):
    """One row of a batch; int64."""

    ids: np.ndarray  # (seq_len,), what the model reads; where there are fewer, the rest of the row is padding
    labels: np.ndarray  # (seq_len + ahead,), the id that follows each, and those further ahead; NO_LABEL counts nothing
    starts: np.ndarray  # rising places in `ids`, above 0, at which a document begins


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
            ahead: labels beyond the one that follows the last position, for a loss on tokens further ahead.
        """
