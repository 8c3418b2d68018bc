"""Work over processes: a bar over all of it, one thread for the tokenizer in each, and none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from megamoe.utils.errors import UserError
from megamoe.utils.interrupts import on_interrupt


def run_all(do: Callable[..., Any], work: list[tuple[Any, ...]], sizes: list[int], what: str, processes: int) -> list:
    """What `do(*one)` returns for each of `work`, in order; called here for one process or one piece of work. Raises
    UserError where a process dies.

    Args:
        sizes: bytes of each, for the bar; `what` is written at it.
    """
    results: list[Any] = [None] * len(work)
    with tqdm(total=sum(sizes), desc=what, unit="B", unit_scale=True) as bar:
        for number, result in _results(do, work, min(processes, len(work))):
            results[number] = result
            bar.update(sizes[number])
    return results


def _results(do: Callable[..., Any], work: list[tuple[Any, ...]], processes: int) -> Iterator[tuple[int, Any]]:
    if processes <= 1:
        yield from ((number, do(*one)) for number, one in enumerate(work))
        return
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_worker)
    before = signal.getsignal(signal.SIGINT)
    on_interrupt(signal.SIG_IGN)  # inherited by the processes: Ctrl-C ends them through this one
    try:
        futures = {pool.submit(do, *one): number for number, one in enumerate(work)}
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} processes was killed, perhaps for want of memory; lower --processes, and the same "
            "command goes on."
        ) from None
    finally:
        if not all(future.done() for future in futures):
            for process in set(multiprocessing.active_children()) - set(others):
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)  # nothing else ends a worker whose parent was killed
