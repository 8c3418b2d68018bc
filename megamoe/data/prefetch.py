"""Batches made by a thread while the step before them trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from megamoe.data.batches import Batch

THREAD = "batches"


class Prefetcher:
    """The batches of step after step, made one step ahead. At most those of two steps are in memory.

    A context manager: the thread starts with the first step and ends with the context. A normal end waits for what the
    thread still makes. An error does not, so that it is reported at once: what the thread reads may never come.
    """

    def __init__(self, make: Callable[[int], Iterable[Batch]], device: torch.device):
        """
        Args:
            make: gives the batches of a step; a pure function, called on the thread.
            device: that the batches will be copied to; for any but the CPU they are in pinned memory.
        """
        self._make = make
        self._device = device
        self._thread = ThreadPoolExecutor(1, THREAD, initializer=self._enter_thread)
        self._next: tuple[int, Future[list[Batch]]] | None = None  # the step and its batches

    def step(self, step: int) -> list[Batch]:
        """The batches of `step`, while the thread goes on to those of the next. Waits for them where they are not made
        yet; raises what making them has raised."""
        batches = self._future_of(step)
        self._next = step + 1, self._thread.submit(self._batches, step + 1)
        return batches.result()

    def _future_of(self, step: int) -> Future[list[Batch]]:
        """The batches of `step`, which the thread makes already, or from now on in place of others."""
        if self._next:
            number, batches = self._next
            if number == step:
                return batches
            batches.cancel()
        return self._thread.submit(self._batches, step)

    def _enter_thread(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread's is the first, where it would take memory

    def _batches(self, step: int) -> list[Batch]:
        return [batch if self._device.type == "cpu" else batch.pin_memory() for batch in self._make(step)]

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=error is None, cancel_futures=True)
