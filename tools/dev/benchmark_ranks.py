"""What it costs that ranks join and watch each other, for any number of them on this machine.

    python tools/dev/benchmark_ranks.py --ranks 8 64 256 1024

Ranks are threads here, those of a host in one process. They join over TCP and watch each other with the code of a run,
and one is killed. Prints seconds, requests to rank 0's store, and lines that the ranks print; also the time in which a
rank finds its samples.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the launch scripts do; torch reads it when it is imported

import psutil
from torch.distributed import PrefixStore, Store

from megamoe.config import cli
from megamoe.data.order import SampleOrder
from megamoe.launch import rendezvous
from megamoe.launch.network import free_port
from megamoe.launch.rank_info import RankInfo
from megamoe.launch.versions import versions
from megamoe.launch.watch import Intervals, Position, Watch
from megamoe.utils.errors import UserError

RANKS_PER_HOST = 8
IDLE_SECONDS = 5  # in which the watch's processor time is measured
INTERVALS = Intervals()
REPORT_SECONDS = 60  # for all ranks to report

_fork = multiprocessing.get_context("fork")  # torch is imported once


class CountedStore:
    """A PrefixStore that counts requests, and the bytes of their keys and values."""

    def __init__(self, prefix: str, store: Store):
        self._store = PrefixStore(prefix, store)
        self.requests: Counter[str] = Counter()  # by method
        self.bytes = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(*args: Any) -> Any:
            result = getattr(self._store, name)(*args)
            self.requests[name] += 1
            self.bytes += _size(args) + _size(result)
            return result

        return request


def _size(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return len(value) if isinstance(value, (str, bytes)) else 0


@dataclass(frozen=True)
class Death:
    """How a rank dies."""

    rank: int
    is_alone: bool = False  # no other rank is on its host
    breaks_collective: bool = False  # the others' collective fails; else it hangs

    def __str__(self) -> str:
        where = "alone on its host" if self.is_alone else "with others on its host"
        return f"rank {self.rank}, {where}, dies and a collective {'fails' if self.breaks_collective else 'hangs'}"


class Job:
    """The ranks of a job. Rank 0 and the last rank, which can die, have processes of their own."""

    def __init__(self, ranks: int, last_is_alone: bool, output: str):
        """
        Args:
            output: file for what the ranks print.
        """
        self.ranks = ranks
        self._port, self._versions, self._output = free_port(), versions(), output
        self._reports = _fork.SimpleQueue()
        self._may_join, self._may_watch = _fork.Event(), _fork.Event()
        self._collective, self._breaks_collective = os.pipe()  # all ranks read, until the other end is closed
        host_of = {rank: f"host{rank // RANKS_PER_HOST}" for rank in range(ranks)}
        if last_is_alone:
            host_of[ranks - 1] = "host_of_one"
        hosts = [range(first, first + RANKS_PER_HOST) for first in range(0, ranks, RANKS_PER_HOST)]
        groups = [[0], *([rank for rank in host if 0 < rank < ranks - 1] for host in hosts), [ranks - 1]]
        self._processes = {
            group[0]: _fork.Process(target=self._be_host, args=(host_of[group[0]], group), daemon=True)
            for group in groups
            if group
        }
        for process in self._processes.values():
            process.start()
        self._gather("started", len(self._processes))

    def join(self) -> dict[int, tuple[float, int, int]]:
        """(when it had joined, requests, their bytes) by rank."""
        self._may_join.set()
        return self._gather("joined", self.ranks)

    def watch(self) -> float:
        """Begin to watch; returns the processor time that rank 0's process takes per second."""
        self._may_watch.set()
        self._gather("watches", self.ranks)
        process = psutil.Process(self._processes[0].pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        return (sum(process.cpu_times()[:2]) - before) / IDLE_SECONDS

    def kill(self, death: Death) -> float:
        """Kill a rank; returns the seconds until the last of the others exits."""
        start = time.monotonic()
        self._processes[death.rank].kill()
        if death.breaks_collective:
            os.close(self._breaks_collective)
        return max(self._gather("exits", self.ranks - 1).values()) - start

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    def _gather(self, kind: str, count: int) -> dict[int, Any]:
        """The first report of this kind from each of `count` ranks."""
        found: dict[int, Any] = {}
        late = threading.Timer(REPORT_SECONDS, self._reports.put, [("late", -1, None)])
        late.start()
        while len(found) < count:
            what, rank, value = self._reports.get()
            if what == "late":
                raise UserError(f"{len(found)} of {count} report {kind!r} within {REPORT_SECONDS} s; lower --ranks.")
            if what == kind:
                found.setdefault(rank, value)
        late.cancel()
        return found

    def _be_host(self, name: str, ranks: list[int]) -> None:
        os.close(self._breaks_collective)
        os.dup2(os.open(self._output, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
        socket.gethostname = lambda: name
        rendezvous.versions = lambda: self._versions  # real ranks read theirs at the same time
        rendezvous.PrefixStore = CountedStore  # type: ignore[misc, assignment]
        self._reports.put(("started", ranks[0], None))
        self._may_join.wait()
        for rank in ranks:
            threading.Thread(target=self._be_rank, args=(rank,)).start()

    def _be_rank(self, rank: int) -> None:
        def leave(code: int) -> NoReturn:
            self._reports.put(("exits", rank, time.monotonic()))
            sys.exit(code)  # ends a thread

        joined = rendezvous.join(RankInfo(rank, self.ranks, 0, 1, "127.0.0.1", self._port, "none"))
        store: Any = joined.store
        self._reports.put(("joined", rank, (time.monotonic(), store.requests.total(), store.bytes)))
        self._may_watch.wait()
        watch = Watch(joined, Position(), leave, INTERVALS)
        self._reports.put(("watches", rank, None))
        os.read(self._collective, 1)
        watch.fail(RuntimeError("connection closed by peer"))


def measure(ranks: int, death: Death) -> list[str]:
    """What ranks cost until one of them dies, a line each."""
    with tempfile.NamedTemporaryFile("r") as output:
        job = Job(ranks, death.is_alone, output.name)
        try:
            start = time.monotonic()
            joined = job.join()
            watching = job.watch()
            seconds = job.kill(death)
            lines = len(output.read().splitlines())
        finally:
            job.end()
    last = max(when for when, _, _ in joined.values()) - start
    _, requests, size = max(joined[rank] for rank in range(1, ranks))
    return [
        f"join: {last:.2f} s; to rank 0's store {requests} requests and {size:,} bytes per rank, of rank 0 "
        f"{joined[0][1]} requests",
        f"watch: {watching * 1e3:.0f} ms of processor time per second in rank 0's process",
        f"{death}: the last of the others exits after {seconds:.1f} s; lines printed: {lines}",
    ]


def order_seconds(ranks: int, samples: int = 2, steps: int = 1000) -> float:
    """Seconds in which a rank finds its samples of a step, in a mix of five large corpora."""
    order = SampleOrder.of([1_000_000_000] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], seed=1)
    start = time.perf_counter()
    for step in range(steps):
        first = (step * ranks + ranks // 2) * samples
        for position in range(first, first + samples):
            order.at(position)
    return (time.perf_counter() - start) / steps


def check(args: argparse.Namespace) -> argparse.Namespace:
    wrong = [ranks for ranks in args.ranks if ranks < 1 or ranks % RANKS_PER_HOST]
    if wrong:
        raise UserError(f"--ranks is {wrong[0]}; give multiples of {RANKS_PER_HOST}, the ranks of a host.")
    return args


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Measure what it costs that ranks join and watch each other.",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024], help="numbers of ranks")
    args = check(parser.parse_args())
    for ranks in args.ranks:
        last = ranks - 1
        deaths = [Death(last), Death(last, is_alone=True, breaks_collective=True), Death(0)]
        first, *others = [measure(ranks, death) for death in deaths]
        found = [*first, *(lines[-1] for lines in others)]
        found.append(f"sample order: {order_seconds(ranks) * 1e3:.3f} ms per step and rank")
        print("\n  ".join([f"{ranks} ranks", *found]), flush=True)


if __name__ == "__main__":
    cli.run(main)
