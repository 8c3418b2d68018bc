"""Batches made by a thread while the step before them trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megamoe.data.batches import Batch

THREAD = "batches"


class Prefetcher:
    """The batches of step after step, made one step ahead. At most those of two steps are in memory.

    The thread starts with the first step and ends with `close`.
    """

    def __init__(self, make: Callable[[int], Iterable[Batch]], device: torch.device):
        """
        Args:
            make: gives the batches of a step; a pure function, called on the thread.
            device: that the batches will be copied to; for any but the CPU they are in pinned memory.
        """
        self._make = make
        self._pins = device.type != "cpu"
        self._thread = ThreadPoolExecutor(1, THREAD)
        self._coming: dict[int, Future[list[Batch]]] = {}

    def step(self, step: int) -> list[Batch]:
        """The batches of `step`, while the thread goes on to those of the next. Raises what making them has raised."""
        batches = self._coming.pop(step, None) or self._thread.submit(self._batches, step)
        self._coming = {step + 1: self._thread.submit(self._batches, step + 1)}
        return batches.result()

    def _batches(self, step: int) -> list[Batch]:
        return [batch.pin_memory() if self._pins else batch for batch in self._make(step)]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
