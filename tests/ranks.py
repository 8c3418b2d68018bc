"""Run a function on several ranks: real processes, one thread each, gloo on the CPU and NCCL on GPUs.

Processes are kept and serve one call after another, each call in a process group of its own.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import numpy as np
import torch

from megamoe.launch.stopping import REQUESTS

# One server imports the heavy modules once; the ranks are forked from it, and it never runs a tensor operation itself.
# On a GPU each rank imports them: what has asked for GPUs must not be forked.
_contexts: dict[str, Any] = {
    "cpu": multiprocessing.get_context("forkserver"),
    "cuda": multiprocessing.get_context("spawn"),
}
_contexts["cpu"].set_forkserver_preload(
    [
        "megamoe.pretrain",
        "torch.utils.tensorboard",
        "pytest",  # which the functions' modules import
        # What torch and DeepSpeed import at the first step only.
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "deepspeed.module_inject.auto_ep_layer",
    ]
)
DEADLINE = 480  # seconds, which end a hang; an operator that DeepSpeed compiles first takes minutes on busy cores
GRACE = 20  # seconds for the other ranks to fail once one has
TRIES = 3  # to form a group: on a busy host gloo may be refused a connection
NOT_JOINED = re.compile(r"EADDRINUSE|port \d+ of \S+ is in use|Connection refused|connectFullMesh failed")
CALLS = 30  # that a process serves: an engine that is gone leaves threads and files of its groups behind


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """Call `function(*args)` on every rank of a new group; returns the results by rank.

    `function` and `args` are pickled: the function must stand at a module's top level, and undo what it changes in
    modules. Raises AssertionError with the rank's traceback if one fails or hangs.
    """
    return _pools[device].run(world_size, function, args)


def run_new_ranks(world_size: int, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """As `run_ranks`, in processes that have run nothing before."""
    pool = RankPool(device)
    try:
        return pool.run(world_size, function, args)
    finally:
        pool.end()


def start_processes(
    world_size: int, function: Callable[..., Any], *args: Any, device: str = "cpu"
) -> list[BaseProcess]:
    """Start `function(*args)` in new processes with the environment of ranks, for the function to join them."""
    _held.append(held := _hold_port())  # to the end: nobody says when rank 0 listens
    return [_start(device, _as_rank, environment, function, args) for environment in _environments(world_size, held)]


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in a new process that belongs to no group, and return its result."""
    worker = _start_worker()
    try:
        worker.pipe.send_bytes(pickle.dumps(({}, function, args)))
        (result,) = _collect([worker])
        return result
    finally:
        worker.process.kill()


@dataclass
class Worker:
    process: BaseProcess
    pipe: connection.Connection
    calls: int = 0


class RankPool:
    """Processes that serve as ranks. Those of a call that failed are not used again."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.workers: list[Worker] = []

    def run(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], tries: int = TRIES) -> Any:
        try:
            return _collect(self._start(world_size, function, args))
        except BaseException as error:
            self.end()
            if tries == 1 or not NOT_JOINED.search(str(error)):
                raise
            warnings.warn(f"{function.__name__} is called again: {error}", stacklevel=3)
            return self.run(world_size, function, args, tries - 1)

    def _start(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Worker]:
        if any(worker.calls == CALLS for worker in self.workers):
            self.end()
        while len(self.workers) < world_size:
            self.workers.append(_start_worker(self.device))
        workers = self.workers[:world_size]
        with _hold_port() as held:
            for worker, environment in zip(workers, _environments(world_size, held), strict=True):
                worker.calls += 1
                worker.pipe.send_bytes(pickle.dumps((environment, function, args)))
            _collect(workers)
        for worker in workers:
            worker.pipe.send_bytes(b"all have joined")
        return workers

    def end(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
        self.workers = []


def _hold_port() -> socket.socket:
    """A socket with a port at which rank 0 can listen, and which the system gives to nobody else until it is closed."""
    held = socket.socket()
    held.bind(("", 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so may torch's store, next to one that does not listen
    return held


def _environments(world_size: int, held: socket.socket) -> list[dict[str, str]]:
    """What a launcher sets for each rank."""
    port = str(held.getsockname()[1])
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }
        for rank in range(world_size)
    ]  # fmt: skip


_held: list[socket.socket] = []
_pools = {device: RankPool(device) for device in _contexts}
for _pool in _pools.values():
    atexit.register(_pool.end)


def _start(device: str, function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start `function(*args)` in a new process in which DeepSpeed finds that device."""
    process = _contexts[device].Process(target=function, args=args, daemon=True)
    with mock.patch.dict(os.environ, DS_ACCELERATOR=device):
        process.start()
    return process


def _start_worker(device: str = "cpu") -> Worker:
    pipe, far_end = _contexts[device].Pipe()
    process = _start(device, _serve, far_end)
    far_end.close()
    return Worker(process, pipe)


def _collect(workers: list[Worker]) -> list[Any]:
    """What each rank gives next. Raises AssertionError with what the failed ranks say."""
    waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
    results: list[Any] = [None] * len(workers)
    errors = []
    until = time.monotonic() + DEADLINE
    while waiting and time.monotonic() < until:
        for pipe in connection.wait(list(waiting), until - time.monotonic()):
            rank = waiting.pop(pipe)
            try:
                results[rank], error = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionError):
                workers[rank].process.join()
                error = f"exit code {workers[rank].process.exitcode}"
            if error:
                errors.append(f"rank {rank}: {error}")
                until = min(until, time.monotonic() + GRACE)
    errors += [f"rank {rank} hangs" for rank in waiting.values()]
    if errors:
        raise AssertionError("\n".join(errors))
    return results


# --- in the process of a rank ---------------------------------------------------------------------------------------


def _serve(pipe: connection.Connection) -> None:
    """Run what comes through the pipe until it is closed. A call that fails is the last one."""
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported stays, and need not be looked through after every call
    state = _State()
    while True:
        try:
            environment, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        faulthandler.dump_traceback_later(DEADLINE - 20)  # to the standard error, where it hangs
        try:
            os.environ.update(environment)
            result = _call_in_group(pipe, function, args) if environment else function(*args)
            pipe.send_bytes(pickle.dumps((result, None)))
        except BaseException:
            pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        del result, function, args
        state.restore()


def _as_rank(environment: dict[str, str], function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    function(*args)


def _call_in_group(pipe: connection.Connection, function: Callable[..., Any], args: Any) -> Any:
    import deepspeed.comm

    from megamoe.launch.distributed import init_distributed

    init_distributed()
    try:
        pipe.send_bytes(pickle.dumps((None, None)))
        pipe.recv_bytes()  # that all have joined
        return function(*args)
    finally:
        deepspeed.comm.destroy_process_group()  # with the expert groups that DeepSpeed keeps


class _State:
    """What a function may change of its process, to be put back for the next one."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.handlers = {number: signal.getsignal(number) for number in REQUESTS}
        self.random = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        random.setstate(self.random[0])
        np.random.set_state(self.random[1])
        torch.set_rng_state(self.random[2])
        torch.set_num_threads(1)
        gc.collect()  # engines are full of cycles
