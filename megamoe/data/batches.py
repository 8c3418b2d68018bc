"""Tokens to batches: the micro-batches of a run and of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from megamoe.data.order import SampleOrder
from megamoe.data.token_files import TokenCorpus

NO_LABEL = -100  # torch's own default for `ignore_index`


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids: Tensor  # (micro-batch, seq_len) int64
    labels: Tensor  # (micro-batch, seq_len) int64, the id that follows each position; NO_LABEL where none counts

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy does not hold up the host."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


@dataclass(frozen=True)
class BatchShape:
    """How the samples of one optimizer step are shared out."""

    micro_batch: int  # samples per rank and forward pass
    accumulation: int  # forward passes per step
    world_size: int
    seq_len: int

    @property
    def samples(self) -> int:
        """Samples in one optimizer step over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size


class TrainData:
    """The micro-batches of a run."""

    def __init__(self, corpora: list[TokenCorpus], weights: list[float], seed: int):
        self.corpora = corpora
        self.order = SampleOrder.of([corpus.num_samples for corpus in corpora], weights, seed)

    def step_batches(self, step: int, rank: int, shape: BatchShape) -> Iterator[Batch]:
        """The micro-batches of `rank` in optimizer step `step`, counted from 1.

        A step's samples stand at consecutive positions: micro-batch by micro-batch, and in each rank by rank.
        """
        for micro in range(shape.accumulation):
            group = ((step - 1) * shape.accumulation + micro) * shape.world_size + rank
            yield self.batch(group * shape.micro_batch, shape.micro_batch)

    def batch(self, first: int, count: int) -> Batch:
        """The samples at positions first .. first + count - 1."""
        places = [self.order.at(position) for position in range(first, first + count)]
        return _to_batch([self.corpora[corpus].sample(index) for corpus, index in places])


def eval_batch(corpus: TokenCorpus, first: int, count: int, limit: int) -> Batch:
    """Held-out samples first .. first + count - 1 in file order; those from `limit` on have no labels.

    Every rank must run equally many forward passes, so the last ones are filled up with samples that do not count.
    """
    batch = _to_batch([corpus.sample(index if index < limit else 0) for index in range(first, first + count)])
    batch.labels[max(limit - first, 0) :] = NO_LABEL
    return batch


def _to_batch(samples: list[np.ndarray]) -> Batch:
    tokens = torch.from_numpy(np.stack(samples))
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone())  # memory of their own: labels may be overwritten
