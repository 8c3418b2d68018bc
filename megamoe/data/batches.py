"""Tokens to batches: the micro-batches of a run and of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamoe.data.order import SampleOrder
from megamoe.data.token_files import TokenCorpus

Batch = tuple[Tensor, Tensor]  # input ids and labels, (micro-batch, seq_len) int64 each


@dataclass(frozen=True)
class BatchShape:
    """How one optimizer step's samples are dealt out."""

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
