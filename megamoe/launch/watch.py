"""Detects that a job cannot continue, names the ranks that died or where all ranks stalled, and ends this rank, which
would hang.

Each rank runs two threads. One posts a heartbeat with the rank's position to the shared store every second and checks
the others' heartbeats; one checks that the store answers and that this rank's launcher is alive.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import DistError, Store

from megamoe.launch.codes import LOST, RESUME, Stopped
from megamoe.launch.exchange import wait_for_keys
from megamoe.launch.exits import code_of, end_groups, leave, message_of
from megamoe.launch.holders import Holders, find_process, is_alive
from megamoe.launch.rendezvous import Rendezvous
from megamoe.utils.errors import UserError, first_line

MAX_SECONDS_BETWEEN_CHECKS = 5.0  # the rest of a longer pause does not count
SHUTDOWN_SECONDS = 60  # to wait for the others after the last step
EXIT_DELAY = 0.2  # seconds until the others have read that rank 0 exits


@dataclass(frozen=True)
class Intervals:
    """Seconds between two looks at the others, and of the waits for them."""

    heartbeat: float = 1.0
    silent: float = 30  # without a heartbeat: a host that lost its power or its network sends nothing
    dead: float = 5  # without a heartbeat, after a collective has failed
    read: float = 10  # for the others to read that the job fails; they look once a heartbeat
    launcher: float = 1.5  # until a launcher, which looks once a second, has seen the code of a dead rank before ours


class Position:
    """Where this rank is, as the training loop and the layers report it."""

    def __init__(self) -> None:
        self.step = 0
        self.activity = "start"
        self.is_alone = False
        self.changes = 0

    def at(self, activity: str, step: int | None = None, *, alone: bool = False) -> None:
        """Report that the rank has come to `activity`.

        Args:
            alone: on rank 0: it works without the other ranks, which wait for it; however long it takes is no stall.
        """
        self.is_alone = alone
        self.step = self.step if step is None else step
        self.activity = activity
        self.changes += 1

    def __str__(self) -> str:
        return f"step {self.step}, {self.activity}"

    def follow(self, layers: Iterable[torch.nn.Module]) -> None:
        """Report each of the layers as forward and backward come to it."""
        for index, layer in enumerate(layers):
            self._follow(layer, f"layer {index}")

    def _follow(self, layer: torch.nn.Module, name: str) -> None:
        def backward(gradient: Tensor) -> None:
            self.at(f"backward of {name}")

        def after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(backward)

        layer.register_forward_pre_hook(lambda module, inputs: self.at(f"forward of {name}"))
        layer.register_forward_hook(after)


class StallTimer:
    """How long a value has not changed, in the time that this process was awake: a job that was suspended as a whole is
    not stalled when it resumes."""

    def __init__(self) -> None:
        self._value: Any = None
        self._seconds = 0.0
        self._checked = time.monotonic()

    def seconds(self, value: Any) -> float:
        """Seconds since the value became `value`; to be called about once a second."""
        now = time.monotonic()
        awake = min(now - self._checked, MAX_SECONDS_BETWEEN_CHECKS)
        self._seconds = self._seconds + awake if value == self._value else 0.0
        self._value, self._checked = value, now
        return self._seconds


class Watch:
    """Ends all ranks with one exit code, and one line for all of them, when the job cannot continue."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        position: Position,
        leave: Callable[[int], NoReturn] = leave,
        intervals: Intervals = Intervals(),
    ):
        """
        Args:
            leave: ends this rank with an exit code.
        """
        self._leave = leave
        self.intervals = intervals
        self.rendezvous = rendezvous
        self.position = position
        self.collective_seconds = math.inf  # without progress of any rank; set once the options are known
        # Told of a failure that this rank is the first to report: message, exit code, dead ranks.
        self.on_failure: Callable[[str, int, Collection[int]], None] = lambda *_: None
        self._rank = rendezvous.rank_info.rank
        self._store = rendezvous.store
        self._heartbeats = 0
        self._answers = 0  # of the store
        found = {rank: find_process(pid) for rank, pid in rendezvous.neighbors.items()}
        self._neighbors = {rank: process for rank, process in found.items() if process}
        self._holders: Holders | None = Holders(rendezvous.rank_info.launcher == "torch", os.environ)
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._check_this_rank, daemon=True)]
        if self._store:
            self._send_heartbeat()
            self._threads.append(threading.Thread(target=self._check_others, args=(self._store,), daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop watching: this rank exits normally.

        All exit together, or their launcher would take the first to exit for a failure and end the others. Rank 0,
        which holds the store and has the most to write, is the last.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if self._store is None:
            return
        try:
            if self._rank == 0:
                others = [f"left/{rank}" for rank in range(1, self.rendezvous.rank_info.world_size)]
                wait_for_keys(others, self._store, time.monotonic() + SHUTDOWN_SECONDS)
                self._store.set("left/0", "")
                time.sleep(EXIT_DELAY)
            else:
                self._store.set(f"left/{self._rank}", "")
                self._store.wait(["left/0"], timedelta(seconds=SHUTDOWN_SECONDS))
        except DistError:
            pass  # rank 0 has exited, which does no harm now

    def fail(self, error: BaseException) -> NoReturn:
        """End this process for `error`, and all others with the same exit code: see `code_of`. Tells the others, says
        why, aborts the collectives that still run, and leaves, in this order.

        A rank that dies breaks its connections, which the others see as an error of a collective: then it is named, and
        the code is `LOST`.
        """
        try:
            if self._store and _may_be_of_a_collective(error):
                # Rank 0, which reads all heartbeats anyway, looks for the dead: its report ends this process.
                self._store.set("suspicion", "")
                time.sleep(self.intervals.dead + 2 * self.intervals.heartbeat)
            self._closing.set()
            code = self._report(self._message(error), code_of(error))
        except DistError:
            if not _may_be_of_a_collective(error):  # which the loss of rank 0 explains
                print(self._message(error), file=sys.stderr, flush=True)
            self._exit_without_store()
        end_groups(failed=True)
        self._leave(code)

    # --- the two threads --------------------------------------------------------------------------------------------

    def _check_others(self, store: Store) -> None:
        beats = [StallTimer() for _ in self.rendezvous.hosts]
        progress = StallTimer()
        try:
            while not self._closing.wait(self.intervals.heartbeat):
                self._send_heartbeat()
                if store.check(["failure"]) and not self._closing.is_set():
                    self._leave(self._read_report(store.get("failure").decode()))
                self._answers += 1
                self._check_processes()
                if self._rank == 0:
                    heartbeats = self._last_heartbeats(range(self.rendezvous.rank_info.world_size))
                    self._check_silence(store, heartbeats, beats)
                    self._check_progress(heartbeats, progress)
        except DistError:
            if not self._closing.wait(self.intervals.dead):  # the job may be exiting normally
                self._exit_without_store()

    def _check_processes(self) -> None:
        """A rank of this host whose process has ended has died for certain."""
        dead = [rank for rank, process in self._neighbors.items() if not is_alive(process)]
        for rank in dead:
            del self._neighbors[rank]
        dead = self._without_exited(dead)
        if dead:
            self._exit_for(dead, "died", self._last_heartbeats(dead[:1]))

    def _check_silence(self, store: Store, heartbeats: dict[int, str], beats: list[StallTimer]) -> None:
        seconds = {rank: beats[rank].seconds(heartbeat) for rank, heartbeat in heartbeats.items()}
        is_suspected = store.check(["suspicion"])
        limit = self.intervals.dead if is_suspected else self.intervals.silent
        # The ranks of a lost host fall silent within a second of each other, and are named together.
        together = limit - 2 * self.intervals.heartbeat
        silent = self._without_exited([rank for rank in seconds if seconds[rank] > together])
        if any(seconds[rank] > limit for rank in silent):
            sent_none = f"{'have' if len(silent) > 1 else 'has'} sent no heartbeat for {limit:g} s"
            self._exit_for(silent, "died" if is_suspected else sent_none, heartbeats)

    def _check_progress(self, heartbeats: dict[int, str], progress: StallTimer) -> None:
        stalled = progress.seconds([heartbeat.partition(" ")[2] for heartbeat in heartbeats.values()])
        # Before the first step, reading a large checkpoint takes as long as it takes.
        is_limited = self.position.step and not self.position.is_alone
        if stalled > self.collective_seconds and is_limited:
            self._exit(f"no rank has made progress for {self.collective_seconds:g} s: {self._positions(heartbeats)}")

    def _check_this_rank(self) -> None:
        answers = StallTimer()
        while not self._closing.wait(self.intervals.heartbeat):
            if self._holders and not self._holders.are_alive():
                self._holders = None
                os.kill(os.getpid(), signal.SIGTERM)  # asks all ranks to save and exit
            if self._store and answers.seconds(self._answers) > self.intervals.silent:
                self._exit_without_store()

    # --- messages and exits -----------------------------------------------------------------------------------------

    def _send_heartbeat(self) -> None:
        assert self._store
        self._heartbeats += 1
        self._store.set(f"heartbeat/{self._rank}", f"{self._heartbeats} {self.position.changes} {self.position}")

    def _last_heartbeats(self, ranks: Collection[int]) -> dict[int, str]:
        """The last heartbeat of each of the ranks; "" from a rank that has sent none."""
        assert self._store
        keys = [f"heartbeat/{rank}" for rank in ranks]
        if not self._store.check(keys):  # one has only just begun
            keys = [key for key in keys if self._store.check([key])]
        found = dict(zip(keys, self._store.multi_get(keys), strict=True))
        return {rank: found.get(f"heartbeat/{rank}", b"").decode() for rank in ranks}

    def _without_exited(self, ranks: list[int]) -> list[int]:
        """Without the ranks that have exited normally."""
        store = self._store
        assert store
        return [rank for rank in ranks if not store.check([f"left/{rank}"])]

    def _positions(self, heartbeats: dict[int, str]) -> str:
        """Which ranks are where."""
        ranks_at: dict[str, list[int]] = {}
        for rank, heartbeat in heartbeats.items():
            ranks_at.setdefault(_position(heartbeat), []).append(rank)
        return "; ".join(f"{self._names(ranks)} in {position}" for position, ranks in ranks_at.items())

    def _names(self, ranks: list[int]) -> str:
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.rendezvous.hosts[rank], []).append(rank)
        return " and ".join(
            f"rank{'s' if len(some) > 1 else ''} {', '.join(map(str, some))} on {host}"
            for host, some in by_host.items()
        )

    def _message(self, error: BaseException) -> str:
        """What all are told of an error: what a user can change and what a disk says needs no stack trace."""
        if isinstance(error, (UserError, Stopped)):
            return message_of(error)
        failure = _failure(f"{self._names([self._rank])} failed in {self.position} ({first_line(error)})")
        return failure if isinstance(error, OSError) else "".join(traceback.format_exception(error)) + failure

    def _report(self, message: str, code: int, dead: Collection[int] = ()) -> int:
        """Report the job's failure, and print it unless another rank has reported one; returns all ranks' exit code."""
        report = " ".join(map(str, [code, self._rank, threading.get_ident(), *dead]))
        first = self._store.compare_set("failure", "", report).decode() if self._store else report
        if first == report:
            print(message, file=sys.stderr, flush=True)
            self.on_failure(message, code, dead)
        return self._read_report(first)

    def _read_report(self, report: str) -> int:
        """All ranks' exit code, by the first report of a failure. The store ends with rank 0's process, so rank 0 waits
        until the others, but for the dead, have read it too."""
        code, _, _, *dead = map(int, report.split())
        if self._store:
            self._store.set(f"heard/{self._rank}", "")
        if dead:
            time.sleep(self.intervals.launcher)
        if self._store and self._rank == 0:
            others = set(range(1, self.rendezvous.rank_info.world_size)) - set(dead)
            wait_for_keys([f"heard/{rank}" for rank in others], self._store, time.monotonic() + self.intervals.read)
        return code

    def _exit_for(self, dead: list[int], what: str, heartbeats: dict[int, str]) -> NoReturn:
        self._exit(f"{self._names(dead)} {what}, last heard of in {_position(heartbeats[dead[0]])}", dead)

    def _exit(self, failure: str, dead: Collection[int] = ()) -> NoReturn:
        try:
            code = self._report(_failure(failure), LOST, dead)
        except DistError:
            self._exit_without_store()
        self._leave(code)

    def _exit_without_store(self) -> NoReturn:
        host, here = self.rendezvous.hosts[0], self.rendezvous.hosts[self._rank]
        same_host = [rank for rank, other in enumerate(self.rendezvous.hosts) if rank and other == here]
        if self._rank == min(same_host, default=0):
            message = _failure(f"rank 0 on {host}, or its launcher, died or cannot be reached")
            print(message, file=sys.stderr, flush=True)
            # One rank of rank 0's host and one of another: either host may be lost, and all at once would be too many.
            if self._rank in (1, next((rank for rank, other in enumerate(self.rendezvous.hosts) if other != host), 1)):
                self.on_failure(message, LOST, [0])
        self._leave(LOST)


def _may_be_of_a_collective(error: BaseException) -> bool:
    of_this_device = torch.OutOfMemoryError, torch.AcceleratorError
    return isinstance(error, RuntimeError) and not isinstance(error, of_this_device)


def _failure(why: str) -> str:
    return f"error: {why}{RESUME}"


def _position(heartbeat: str) -> str:
    return heartbeat.split(" ", 2)[2] if heartbeat else "its start"
