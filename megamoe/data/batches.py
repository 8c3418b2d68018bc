"""Tokens to batches: the micro-batches of a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamoe.config.phases import Phase, Phases
from megamoe.config.run import short_name
from megamoe.data.document_bounds import Documents
from megamoe.data.order import SampleOrder
from megamoe.data.source import NO_LABEL, DataSource, Sample, is_remote

READ_AHEAD = 128  # samples of a rank that are read before their step, where one source is on an object store
THREADS = 8  # that read them, which hides the latency


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids: Tensor  # (micro-batch, seq_len) int64
    # (micro-batch, seq_len + ahead) int64: [:, t] is the id that follows position t, [:, t + k] the one k further on;
    # NO_LABEL where none counts, or the corpus has ended.
    labels: Tensor
    documents: Documents | None = None  # within which attention stays; None without borders and padding
    sources: Tensor | None = None  # (micro-batch,) int64, by number; None where no phase mixes any

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies it while the host goes on."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy of a pinned batch does not hold up the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        documents = self.documents.map(function) if self.documents else None
        sources = None if self.sources is None else function(self.sources)
        return Batch(function(self.input_ids), function(self.labels), documents, sources)


class TrainData:
    """The micro-batches of a run, phase by phase."""

    def __init__(
        self,
        phases: Phases,
        sources: Mapping[tuple[str, int], DataSource],
        seed: int,
        document_attention: bool = False,
    ):
        """
        Args:
            sources: of all phases, by path and seq_len.
            document_attention: the field of `ModelConfig`.
        """
        self.document_attention = document_attention
        self.phases = phases
        self.sources = sources
        self._threads = ThreadPoolExecutor(THREADS, "samples") if any(is_remote(path) for path, _ in sources) else None
        self._begun: dict[tuple[int, int, int], list[Future[Sample]]] = {}  # by step, rank and `ahead`
        numbers = {path: number for number, path in enumerate(dict.fromkeys(path for path, _ in sources))}
        short = [short_name(path) for path in numbers]
        is_mixed = any(len(phase.data) > 1 for phase in phases.all)
        # For logs, by number; none where no phase mixes sources.
        self.source_names = [] if not is_mixed else short if len(set(short)) == len(short) else list(numbers)
        self._orders: dict[Phase, SampleOrder] = {}
        walked = dict.fromkeys(numbers, 0)  # tokens of each path
        for phase in phases.all:
            paths = [one.path for one in phase.data]
            self._orders[phase] = SampleOrder.of(
                [sources[path, phase.seq_len].num_samples for path in paths],
                [one.weight for one in phase.data],
                seed,
                [numbers[path] for path in paths],
                [-(-walked[path] // phase.seq_len) for path in paths],
            )
            for path, samples in zip(paths, self._samples_of(phase), strict=True):
                walked[path] += (samples or 0) * phase.seq_len

    def _samples_of(self, phase: Phase) -> list[int | None]:
        """Samples that a phase takes of each source; None for the last one, which goes on."""
        ends = [one.first_step for one in self.phases.all if one.first_step > phase.first_step]
        count = (ends[0] - phase.first_step) * phase.samples if ends else 0
        return [self._orders[phase].before(count, place) if ends else None for place in range(len(phase.data))]

    def record(self) -> list[dict[str, Any]]:
        """What each phase reads: of each source so many samples of its random order, from `first_sample` on."""
        return [
            {
                "first_step": phase.first_step,
                "seq_len": phase.seq_len,
                "samples_per_step": phase.samples,
                "data": [
                    {
                        "path": one.path,
                        "weight": one.weight,
                        "fingerprint": self.sources[one.path, phase.seq_len].fingerprint,
                        "first_sample": first,
                        "samples": samples,
                    }
                    for one, first, samples in zip(
                        phase.data, self._orders[phase].taken, self._samples_of(phase), strict=True
                    )
                ],
            }
            for phase in self.phases.all
        ]

    def step_batches(self, step: int, rank: int, ahead: int = 0) -> Iterator[Batch]:
        """The micro-batches of `rank` in optimizer step `step`, counted from 1.

        A step's samples stand at consecutive positions: micro-batch by micro-batch, and in each rank by rank.

        Args:
            ahead: labels beyond the one that follows a sample's last position, for a loss on tokens further ahead.
        """
        phase, samples = self.phases.at(step), self._samples(step, rank, ahead)
        numbers = (number for number, _, _ in self._sources_at(step, rank))
        while taken := list(itertools.islice(samples, phase.micro_batch)):
            if not self.document_attention:
                taken = [sample._replace(starts=sample.starts[:0]) for sample in taken]
            of_batch = torch.tensor(list(itertools.islice(numbers, len(taken)))) if self.source_names else None
            yield _to_batch(taken, phase.seq_len, ahead, of_batch)

    def _samples(self, step: int, rank: int, ahead: int) -> Iterator[Sample]:
        """Those of a rank in a step."""
        if not self._threads:
            return (source.sample(index, ahead) for _, source, index in self._sources_at(step, rank))
        last = step + 1 + READ_AHEAD * self.phases.world_size // self.phases.at(step).samples
        for later in range(step, last + 1):
            if (later, rank, ahead) not in self._begun:
                self._begun[later, rank, ahead] = [
                    self._threads.submit(source.sample, index, ahead)
                    for _, source, index in self._sources_at(later, rank)
                ]
        for passed in [key for key in self._begun if key[0] < step]:  # a run that goes back passes steps over
            del self._begun[passed]
        return (sample.result() for sample in self._begun.pop((step, rank, ahead)))

    def _sources_at(self, step: int, rank: int) -> Iterator[tuple[int, DataSource, int]]:
        """(number of its source, source, number) of each sample of a rank in a step."""
        phase = self.phases.at(step)
        sources, micro = [self.sources[one.path, phase.seq_len] for one in phase.data], phase.micro_batch
        for first in range(rank * micro, phase.samples, micro * self.phases.world_size):
            for place, index in self._places(step, first, micro):
                yield self._orders[phase].numbers[place], sources[place], index

    def step_samples(self, step: int) -> list[tuple[int, int]]:
        """(source, sample), by number from 0, of all samples of a step over all ranks, in their order. Sources count
        in the order in which phases name them."""
        phase = self.phases.at(step)
        numbers = self._orders[phase].numbers
        return [(numbers[place], index) for place, index in self._places(step, 0, phase.samples)]

    def _places(self, step: int, first: int, count: int) -> list[tuple[int, int]]:
        """(place in its phase's mix, sample) of so many samples of a step, from its `first` on."""
        phase = self.phases.at(step)
        start = (step - phase.first_step) * phase.samples + first
        return [self._orders[phase].at(position) for position in range(start, start + count)]


def _to_batch(samples: list[Sample], seq_len: int, ahead: int, sources: Tensor | None) -> Batch:
    inputs = np.zeros((len(samples), seq_len), dtype=np.int64)
    labels = np.full((len(samples), seq_len + ahead), NO_LABEL)  # of their own memory: they may be overwritten
    for read, predicted, sample in zip(inputs, labels, samples, strict=True):
        read[: len(sample.ids)] = sample.ids
        predicted[: len(sample.labels)] = sample.labels
    lengths = [len(sample.ids) for sample in samples]
    documents = Documents.of([sample.starts for sample in samples], lengths, seq_len)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), documents, sources)
