"""Run a function on several ranks: real processes, gloo, one thread each."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# One server imports the heavy modules once; the ranks are forked from it, and it never runs a tensor operation itself.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["megamoe.training.loop", "megamoe.training.engine", "megamoe.training.distributed"])
TIMEOUT = 240  # seconds: a hang is a failure


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """Start `function(*args)` on every rank of a new gloo group; what it returns or raises lands in `folder`."""
    port = free_port()
    ranks = [
        _context.Process(target=_rank_main, args=(rank, world_size, port, folder, function, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a new gloo group; returns the results by rank.

    `function` and `args` are pickled: the function must stand at a module's top level. Raises AssertionError with the
    rank's traceback if one fails or hangs.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = start_ranks(world_size, folder, function, *args)
        try:
            for process in ranks:
                process.join(TIMEOUT)
            errors = [file.read_text() for file in sorted(folder.glob("error_*"))]
            codes = [process.exitcode for process in ranks]
            assert codes == [0] * world_size, f"exit codes {codes} (None: hung)\n" + "\n".join(errors)
        finally:
            for process in ranks:
                process.kill()
        return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(world_size)]


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in a process that belongs to no group, and return its result."""
    with ProcessPoolExecutor(1, mp_context=_context) as pool:
        return pool.submit(function, *args).result(TIMEOUT)


def _rank_main(rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], args: Any) -> None:
    from megamoe.training.distributed import init_distributed

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    trace = open(folder / f"error_{rank}_hung", "w")  # noqa: SIM115 - open for as long as the rank runs
    faulthandler.dump_traceback_later(TIMEOUT - 20, file=trace)  # where each thread stands, if it comes to that
    try:
        init_distributed()
        torch.save(function(*args), folder / f"result_{rank}")
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
