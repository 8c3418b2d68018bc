"""Tokens to batches: the micro-batches of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamoe.data.batch_warmup import BatchWarmup
from megamoe.data.order import SampleOrder
from megamoe.data.source import DataSource, Sample

NO_LABEL = -100  # torch's own default for `ignore_index`


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids: Tensor  # (micro-batch, seq_len) int64
    # (micro-batch, seq_len + ahead) int64: [:, t] is the id that follows position t, [:, t + k] the one k further on;
    # NO_LABEL where none counts, or the corpus has ended.
    labels: Tensor

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies it while the host goes on."""
        return Batch(self.input_ids.pin_memory(), self.labels.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy of a pinned batch does not hold up the host."""
        tensors = (self.input_ids, self.labels)
        return Batch(*(tensor.to(device, non_blocking=tensor.is_pinned()) for tensor in tensors))


@dataclass(frozen=True)
class BatchShape:
    """How the samples of an optimizer step are shared out."""

    micro_batch: int  # samples per rank and forward pass
    accumulation: int  # forward passes per step, after the warmup if there is one
    world_size: int
    seq_len: int
    stages: tuple[tuple[int, int], ...] = ()  # of the warmup, see `BatchWarmup`; multiples of micro_batch x world_size

    @property
    def samples(self) -> int:
        """Samples in one optimizer step over all ranks, after the warmup."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def warmup(self) -> BatchWarmup:
        """Samples in each optimizer step."""
        return BatchWarmup(self.samples, self.stages)


class TrainData:
    """The micro-batches of a run."""

    def __init__(self, sources: list[DataSource], weights: list[float], seed: int):
        self.sources = sources
        self.order = SampleOrder.of([source.num_samples for source in sources], weights, seed)

    def step_batches(self, step: int, rank: int, shape: BatchShape, ahead: int = 0) -> Iterator[Batch]:
        """The micro-batches of `rank` in optimizer step `step`, counted from 1; `ahead` as for `batch`.

        A step's samples stand at consecutive positions: micro-batch by micro-batch, and in each rank by rank.
        """
        first, samples = shape.warmup.samples_before(step), shape.warmup.samples_of(step)
        for start in range(first + rank * shape.micro_batch, first + samples, shape.micro_batch * shape.world_size):
            yield self.batch(start, shape.micro_batch, ahead)

    def step_samples(self, step: int, shape: BatchShape) -> list[tuple[int, int]]:
        """(source, sample), by number from 0, of all samples of a step over all ranks, in the order of positions."""
        first = shape.warmup.samples_before(step)
        return [self.order.at(position) for position in range(first, first + shape.warmup.samples_of(step))]

    def batch(self, first: int, count: int, ahead: int = 0) -> Batch:
        """The samples at positions first .. first + count - 1.

        Args:
            ahead: labels beyond the one that follows a sample's last position, for a loss on tokens further ahead.
        """
        places = [self.order.at(position) for position in range(first, first + count)]
        samples = [self.sources[source].sample(index, ahead) for source, index in places]
        return _to_batch(samples, self.sources[0].seq_len, ahead)


def _to_batch(samples: list[Sample], seq_len: int, ahead: int = 0) -> Batch:
    tokens = np.full((len(samples), seq_len + 1 + ahead), NO_LABEL, dtype=np.int64)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample.ids)] = sample.ids
    # Memory of their own: labels may be overwritten. Copied by numpy, for torch may start threads.
    inputs, labels = tokens[:, :seq_len].copy(), tokens[:, 1:].copy()
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))
