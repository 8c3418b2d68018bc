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

from megamoe.data.inputs import Unit
from megamoe.utils.errors import UserError
from megamoe.utils.interrupts import on_interrupt


def run_all(do: Callable[[Unit], Any], units: list[Unit], what: str, processes: int) -> list[Any]:
    """What `do` returns for each unit, in order; called here for one process or one unit. Raises UserError where a
    process dies.

    Args:
        what: is written at the bar.
    """
    results = {}
    with tqdm(total=sum(unit.size for unit in units), desc=what, unit="B", unit_scale=True) as bar:
        for unit, result in _results(do, units, min(processes, len(units))):
            results[unit.number] = result
            bar.update(unit.size)
    return [results[unit.number] for unit in units]


def _results(do: Callable[[Unit], Any], units: list[Unit], processes: int) -> Iterator[tuple[Unit, Any]]:
    if processes <= 1:
        yield from ((unit, do(unit)) for unit in units)
        return
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_worker)
    before = signal.getsignal(signal.SIGINT)
    on_interrupt(signal.SIG_IGN)  # inherited by the processes: Ctrl-C ends them through this one
    try:
        futures = {pool.submit(do, unit): unit for unit in units}
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
