"""The arithmetic of every evaluation: what a model gives the tokens of windows, summed over ranks.

Held-out sets in training, `megamoe.evaluate`, `megamoe evaluate` and lm-evaluation-harness score by `score` here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megamoe.data.document_bounds import Documents
from megamoe.data.source import NO_LABEL
from megamoe.model.decoder import Decoder


class Window(NamedTuple):
    """What one row of a forward pass is scored on."""

    ids: np.ndarray  # (T,) whole numbers, what the model reads
    labels: np.ndarray  # (T,), the id that follows each; NO_LABEL where none counts
    owner: int  # number of the document, or whatever else its sums belong to
    starts: np.ndarray = np.zeros(0, dtype=np.int64)  # as of a `Sample`, where the row has several documents


class Share(NamedTuple):
    """This rank's part of the windows of all ranks."""

    micro_batch: int  # windows of a rank per forward pass
    rank: int = 0
    world_size: int = 1


FILL = Window(np.zeros(1, dtype=np.int64), np.full(1, NO_LABEL), 0)  # for a rank that has no window left


def windows_of(ids: Sequence[int] | np.ndarray, before: int, length: int, stride: int, owner: int) -> Iterator[Window]:
    """Windows that predict each of the ids once, the first one behind the token `before`.

    Args:
        length: most tokens that the model reads at a time.
        stride: tokens from one window's start to the next one's, at most `length`. A window is scored where the one
            before has ended; what overlaps is context.
    """
    stream = np.concatenate(([before], ids)).astype(np.int64)
    total, scored = len(stream) - 1, 0
    for start in itertools.count(0, stride):
        end = min(start + length, total)
        labels = stream[start + 1 : end + 1].copy()
        labels[: scored - start] = NO_LABEL
        yield Window(stream[start:end], labels, owner)
        scored = end
        if end == total:
            return


@torch.no_grad()
def score(model: Decoder, windows: Iterable[Window], owners: int, share: Share, device: torch.device) -> Tensor:
    """(owners, 3) fp64 on the host: sums of nats, tokens, and tokens of which another was more likely, over all ranks.
    Leaves the model in evaluation mode. Collective; every rank gives the same windows and runs equally many forward
    passes, which experts on several ranks need."""
    model.eval()
    sums = torch.zeros(owners, 3, dtype=torch.float64, device=device)
    windows, start = iter(windows), share.rank * share.micro_batch
    while group := list(itertools.islice(windows, share.micro_batch * share.world_size)):
        mine = group[start : start + share.micro_batch] or [FILL]
        ids = _rows([window.ids for window in mine]).clamp_min(0).to(device)
        labels = _rows([window.labels for window in mine]).to(device)
        lengths = [ids.shape[1]] * len(mine)  # the padding behind a row changes nothing before it
        documents = Documents.of([window.starts for window in mine], lengths, ids.shape[1])
        scores = model.score(ids, labels, documents and documents.map(lambda tensor: tensor.to(device)))
        values = torch.stack((scores.nats.double(), (labels != NO_LABEL).double(), (~scores.is_likeliest).double()), -1)
        sums.index_add_(0, torch.tensor([window.owner for window in mine], device=device), values.sum(1))
    if share.world_size > 1:
        dist.all_reduce(sums)
    return sums.cpu()


def _rows(arrays: Sequence[np.ndarray]) -> Tensor:
    """(B, longest) int64, filled up with NO_LABEL on the right, where no other position sees it."""
    rows = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    return pad_sequence(rows, batch_first=True, padding_value=NO_LABEL)


def bits_per_byte(nats: float, size: int) -> float:
    """Nats of a text of `size` bytes, in bits per byte."""
    return nats / math.log(2) / size
