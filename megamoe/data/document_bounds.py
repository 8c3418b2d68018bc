"""Where documents begin in the rows of a batch, made on the host, so that no device is asked for it.

Shape legend: B batch, T positions of a row, N positions of the batch (B * T), n documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a batch's rows, one row after the other; the padding at the end of a row is one too."""

    positions: Tensor  # (B, T) int64, of each token in its document
    starts: Tensor  # (n + 1,) int32: where each document begins among the N positions, and N
    host_starts: Tensor  # the same, in the host's memory always
    longest: int  # positions of a document
    tokens: Tensor | None = None  # (tokens,) int64: which of the N positions are not padding; None where all are

    @classmethod
    def of(cls, starts: Sequence[np.ndarray], lengths: Sequence[int], length: int) -> Documents | None:
        """None where each row is one document without padding.

        Args:
            starts: of each row, rising positions above 0 at which a document begins.
            lengths: of each row, its tokens; up to T, what follows is padding.
            length: T.
        """
        places, sizes = np.arange(len(starts) * length).reshape(-1, length), np.asarray(lengths)[:, np.newaxis]
        is_start = places % length == np.minimum(sizes, length)  # of the padding
        is_start[:, 0] = True
        for row, of_row in zip(is_start, starts, strict=True):
            row[of_row[of_row < length]] = True
        bounds = np.append(np.flatnonzero(is_start), is_start.size)
        if len(bounds) == len(is_start) + 1:
            return None
        positions = places - np.repeat(bounds[:-1], np.diff(bounds)).reshape(places.shape)
        on_host, tokens = torch.from_numpy(bounds.astype(np.int32)), np.flatnonzero(places % length < sizes)
        padded = torch.from_numpy(tokens) if len(tokens) < places.size else None
        return cls(torch.from_numpy(positions), on_host, on_host, int(np.diff(bounds).max()), padded)

    def map(self, function: Callable[[Tensor], Tensor]) -> Documents:
        """The same documents, with `function` of each tensor."""
        tokens = None if self.tokens is None else function(self.tokens)
        return replace(self, positions=function(self.positions), starts=function(self.starts), tokens=tokens)
