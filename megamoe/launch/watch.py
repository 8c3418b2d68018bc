"""Notices when a job cannot go on, says who went or where it stands, and ends this rank, where it would hang.

Two threads of each rank. One tells the shared store every second that the rank lives and where it is, and looks whether
others do; one looks whether this rank still moves and whether the launcher that should end it is still there.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
from torch import Tensor
from torch.distributed import DistError, Store

from megamoe.launch.rendezvous import Meeting, Member, await_keys, first_line

LOST = 76  # exit code of a rank that ends because another one went, or because nothing moves
PULSE_SECONDS = 1.0
SILENT_SECONDS = 30  # without a pulse: a host that lost its power or its network says nothing
MOST_BETWEEN_LOOKS = 5.0  # seconds that count, of those between two looks
DEAD_SECONDS = 5  # without a pulse, after a collective has failed
FAREWELL_SECONDS = 60  # to wait for the others at a good end
LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed")  # as their command lines show them


class Position:
    """Where this rank is, as the training loop and the layers note it."""

    def __init__(self) -> None:
        self.step = 0
        self.doing = "start"
        self.moves = 0

    def at(self, doing: str, step: int | None = None) -> None:
        """Note that the rank has come to `doing`."""
        self.step = self.step if step is None else step
        self.doing = doing
        self.moves += 1

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"

    def follow(self, layers: Iterable[torch.nn.Module]) -> None:
        """Note each of the layers as forward and backward come to it."""
        for index, layer in enumerate(layers):
            self._follow(layer, f"layer {index}")

    def _follow(self, layer: torch.nn.Module, name: str) -> None:
        def backward(gradient: Tensor) -> None:
            self.at(f"backward of {name}")

        def after(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(backward)

        layer.register_forward_pre_hook(lambda module, inputs: self.at(f"forward of {name}"))
        layer.register_forward_hook(after)


class Stillness:
    """How long a value has been the same, in the time that this process was awake: a job that is suspended as a whole
    must not miss its ranks when it goes on."""

    def __init__(self) -> None:
        self._value: Any = None
        self._seconds = 0.0
        self._looked = time.monotonic()

    def seconds(self, value: Any) -> float:
        """Seconds since `value` has been this one; to be asked about once a second."""
        now = time.monotonic()
        self._seconds = self._seconds + min(now - self._looked, MOST_BETWEEN_LOOKS) if value == self._value else 0.0
        self._value, self._looked = value, now
        return self._seconds


class Watch:
    """Ends this process with exit code `LOST` and one line for all ranks when the job cannot go on."""

    def __init__(self, meeting: Meeting, position: Position):
        self.meeting = meeting
        self.position = position
        self.collective_seconds = math.inf  # most in which no rank may move; set once the options are known
        self._rank = meeting.seat.rank
        self._store = meeting.store
        self._beats = 0
        self._answers = 0  # of the store
        self._neighbours = _neighbours(meeting)
        self._launchers = launchers(psutil.Process()) if meeting.seat.launcher == "torch" else []
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._guard, daemon=True)]
        if self._store:
            self._pulse()
            self._threads.append(threading.Thread(target=self._follow_others, args=(self._store,), daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop watching: this rank leaves in good order.

        All leave together, or their launcher would take the first to go for a failure and end the others. Rank 0, which
        holds the store and has the most to put away, is the last to come.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if self._store is None:
            return
        try:
            if self._rank == 0:
                others = [f"left/{rank}" for rank in range(1, self.meeting.seat.world_size)]
                await_keys(others, self._store, time.monotonic() + FAREWELL_SECONDS)
                self._store.set("left/0", "")
                time.sleep(0.2)  # until the others have heard it
            else:
                self._store.set(f"left/{self._rank}", "")
                self._store.wait(["left/0"], timedelta(seconds=FAREWELL_SECONDS))
        except DistError:
            pass  # rank 0 has gone, which is no matter now

    def explain(self, error: BaseException) -> None:
        """End this process if `error` came of another rank's end; else tell the others that this rank fails.

        A rank that dies breaks its connections, which the others see as an error of a collective.
        """
        if self._store is None or self._closing.is_set():
            return
        try:
            before = self._pulses()
            time.sleep(DEAD_SECONDS)
            after = self._pulses()
            dead = [rank for rank, pulse in after.items() if pulse == before[rank] and rank != self._rank]
            dead = self._still_here(dead)
        except DistError:
            self._leave_without_store()
        if dead:
            self._end(f"{self._named(dead)} went, last heard of in {_place(after[dead[0]])}")
        self._closing.set()
        self._conclude(f"{self._named([self._rank])} failed in {self.position} ({first_line(error)})")

    # --- the two threads --------------------------------------------------------------------------------------------

    def _follow_others(self, store: Store) -> None:
        beats = [Stillness() for _ in self.meeting.members]
        moves = Stillness()
        try:
            while not self._closing.wait(PULSE_SECONDS):
                self._pulse()
                if store.check(["verdict"]):
                    self._let_the_others_read()
                    os._exit(LOST)
                self._answers += 1
                self._look_at_neighbours()
                if self._rank == 0:
                    pulses = self._pulses()
                    self._look_for_the_silent(pulses, beats)
                    self._look_for_a_standstill(pulses, moves)
        except DistError:
            if not self._closing.wait(DEAD_SECONDS):  # this job may be on its way out in good order
                self._leave_without_store()

    def _look_at_neighbours(self) -> None:
        """A rank of this host whose process has ended is gone, without any doubt."""
        gone = [rank for rank, process in self._neighbours.items() if not _lives(process)]
        for rank in gone:
            del self._neighbours[rank]
        gone = self._still_here(gone)
        if gone:
            self._end(f"{self._named(gone)} went, last heard of in {_place(self._pulses()[gone[0]])}")

    def _look_for_the_silent(self, pulses: dict[int, str], beats: list[Stillness]) -> None:
        still = {rank: beats[rank].seconds(pulse) for rank, pulse in pulses.items()}
        # The ranks of a host that is gone fell silent within a second of each other, and are named together.
        silent = self._still_here([rank for rank, seconds in still.items() if seconds > SILENT_SECONDS / 2])
        if any(still[rank] > SILENT_SECONDS for rank in silent):
            verb = "have" if len(silent) > 1 else "has"
            where = _place(pulses[silent[0]])
            self._end(f"{self._named(silent)} {verb} been silent for {SILENT_SECONDS} s, last heard of in {where}")

    def _look_for_a_standstill(self, pulses: dict[int, str], moves: Stillness) -> None:
        still = moves.seconds([pulse.partition(" ")[2] for pulse in pulses.values()])
        # Ahead of the first step, reading a large checkpoint takes as long as it takes.
        if still > self.collective_seconds and self.position.step:
            self._end(f"nothing has moved for {self.collective_seconds:g} s: {self._standings(pulses)}")

    def _guard(self) -> None:
        answers = Stillness()
        while not self._closing.wait(PULSE_SECONDS):
            if self._launchers and not all(child.ppid() == parent for child, parent in self._launchers):
                self._launchers = []
                os.kill(os.getpid(), signal.SIGTERM)  # asks all ranks to save and leave
            if self._store and answers.seconds(self._answers) > SILENT_SECONDS:
                self._leave_without_store()

    # --- words and ends ---------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        assert self._store
        self._beats += 1
        self._store.set(f"pulse/{self._rank}", f"{self._beats} {self.position.moves} {self.position}")

    def _pulses(self) -> dict[int, str]:
        """What each rank has last said of itself."""
        assert self._store
        keys = [f"pulse/{rank}" for rank in range(self.meeting.seat.world_size)]
        if not self._store.check(keys):  # one has only just begun
            keys = [key for key in keys if self._store.check([key])]
        said = zip(keys, self._store.multi_get(keys), strict=True)
        pulses = {int(key.removeprefix("pulse/")): value.decode() for key, value in said}
        return {rank: pulses.get(rank, "") for rank in range(self.meeting.seat.world_size)}

    def _still_here(self, ranks: list[int]) -> list[int]:
        """Without those that have left in good order."""
        store = self._store
        assert store
        return [rank for rank in ranks if not store.check([f"left/{rank}"])]

    def _standings(self, pulses: dict[int, str]) -> str:
        """Which ranks stand where."""
        places: dict[str, list[int]] = {}
        for rank, pulse in pulses.items():
            places.setdefault(_place(pulse), []).append(rank)
        return "; ".join(f"{self._named(ranks)} in {place}" for place, ranks in places.items())

    def _named(self, ranks: list[int]) -> str:
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.meeting.members[rank].host, []).append(rank)
        return " and ".join(
            f"rank{'s' if len(some) > 1 else ''} {', '.join(map(str, some))} on {host}"
            for host, some in by_host.items()
        )

    def _conclude(self, line: str) -> None:
        """Give the job's verdict, and say it, unless another rank has."""
        assert self._store
        if self._store.add("verdict", 1) == 1:
            _say(line)
        self._let_the_others_read()

    def _let_the_others_read(self) -> None:
        """The store goes with rank 0's process; the others look for a verdict at every pulse."""
        if self._rank == 0:
            time.sleep(2 * PULSE_SECONDS)

    def _end(self, line: str) -> NoReturn:
        try:
            self._conclude(line)
        except DistError:
            self._leave_without_store()
        os._exit(LOST)

    def _leave_without_store(self) -> NoReturn:
        host = self.meeting.members[0].host
        here = self.meeting.members[self._rank].host
        same_host = [rank for rank, member in enumerate(self.meeting.members) if rank and member.host == here]
        if self._rank == min(same_host, default=0):
            _say(f"rank 0 on {host}, or its launcher, went or cannot be reached")
        os._exit(LOST)


def _say(line: str) -> None:
    print(f"error: {line}; go on from the last checkpoint with --resume.", file=sys.stderr, flush=True)


def _place(pulse: str) -> str:
    return pulse.split(" ", 2)[2] if pulse else "its start"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _neighbours(meeting: Meeting) -> dict[int, psutil.Process]:
    """The processes of the other ranks that can be seen from here."""

    def place(member: Member) -> tuple[str, str]:
        return member.host, member.pid_space

    here = place(meeting.members[meeting.seat.rank])
    found = {}
    for rank, member in enumerate(meeting.members):
        if rank != meeting.seat.rank and place(member) == here:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[rank] = psutil.Process(member.pid)
    return found


def launchers(process: psutil.Process) -> list[tuple[psutil.Process, int]]:
    """The launcher's processes above a rank, as pairs of a process and the id of the parent that it must keep.

    DeepSpeed has a launch.py on each host, below `deepspeed` itself, or, started over ssh, below sshd and perhaps a
    shell; torchrun has its agent. Any other parent may go: a rank under nohup outlives its shell.
    """
    pairs = []
    parent = process.parent()
    if parent and any(name in word for word in parent.cmdline() for name in LAUNCHERS):
        pairs.append((process, parent.pid))
        above = parent.parent()
        if "deepspeed.launcher.launch" in parent.cmdline() and above:
            pairs.append((parent, above.pid))
            if above.name() in ("sh", "bash", "dash", "zsh") and above.parent():
                pairs.append((above, above.ppid()))
    return pairs
