"""Work over processes: one bar over all of it, one thread for the tokenizer in each, none left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from megamoe.utils.errors import UserError
from megamoe.utils.interrupts import on_interrupt


class Progress:
    """Bytes done of one piece of work, in a file that all processes map."""

    def __init__(self, file: str, number: int):
        self._file = file
        self._number = number

    def __call__(self, done: int) -> None:
        self._slots[self._number] = done

    @cached_property
    def _slots(self) -> np.ndarray:
        return np.memmap(self._file, np.int64, "r+")


def run_all(
    do: Callable[..., Any], work: list[tuple[Any, ...]], sizes: list[int], what: str, processes: int
) -> list[Any]:
    """What `do(*arguments, progress)` returns for each of `work`, in order. With one process, or one piece of work, it
    is called here. Raises UserError where a process dies.

    Args:
        sizes: bytes of each; `progress` is called with those that are done.
        what: is written at the bar.
    """
    if not work:
        return []
    with tempfile.NamedTemporaryFile() as file:
        slots = np.memmap(file, np.int64, "w+", shape=(len(work),))
        with _bar(what, sum(sizes), slots):
            arguments = [(*one, Progress(file.name, number)) for number, one in enumerate(work)]
            if min(processes, len(work)) == 1:
                return [do(*one) for one in arguments]
            return _in_processes(do, arguments, min(processes, len(work)))


@contextmanager
def _bar(what: str, total: int, slots: np.ndarray) -> Iterator[None]:
    stop = threading.Event()
    with tqdm(total=total, desc=what, unit="B", unit_scale=True) as bar:

        def follow() -> None:
            while not stop.wait(0.5):
                bar.update(int(slots.sum()) - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            bar.update(int(slots.sum()) - bar.n)


def _in_processes(do: Callable[..., Any], arguments: list[tuple[Any, ...]], processes: int) -> list[Any]:
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_worker)
    before = signal.getsignal(signal.SIGINT)
    on_interrupt(signal.SIG_IGN)  # the processes inherit it: Ctrl-C ends them through this one
    try:
        futures = [pool.submit(do, *one) for one in arguments]
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} processes was killed, perhaps for want of memory; lower --processes, and the same "
            "command goes on."
        ) from None
    finally:
        if not all(future.done() for future in futures):
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)  # nobody else ends a worker whose parent was killed

    threading.Thread(target=follow, daemon=True).start()
