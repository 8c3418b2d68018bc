"""Requests to stop a run before its last step: a signal, or the end of its time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping

import psutil

STOPPED = 75  # exit code of a run that has saved and left early: EX_TEMPFAIL of sysexits.h
INTERRUPTED = 128 + signal.SIGINT
SAME_INTERRUPT_SECONDS = 0.5  # a launcher may forward the Ctrl-C that the terminal has sent to all


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 requests a stop; the ranks share it at the end of a step, save and exit.

    A second Ctrl-C exits at once, whatever the main thread waits for. To be made on the main thread.
    """

    def __init__(self) -> None:
        self.asked = False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python runs a handler only when the main thread returns from a collective; the wake-up byte arrives at once.
        signal.set_wakeup_fd(writing)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def _listen(self, reading: int) -> None:
        first = None
        while True:
            number = os.read(reading, 1)[0]
            if number == signal.SIGINT:
                now = time.monotonic()
                first = first or now
                if now - first > SAME_INTERRUPT_SECONDS:
                    os._exit(INTERRUPTED)
            if number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self.asked = True


class Deadline:
    """When a run must be over: after its time limit, or at the end of its Slurm job, whichever is first."""

    def __init__(self, limit_seconds: float | None, environment: Mapping[str, str]):
        ends = []
        if limit_seconds is not None:
            ends.append(psutil.Process().create_time() + limit_seconds)
        if "SLURM_JOB_END_TIME" in environment:
            ends.append(float(environment["SLURM_JOB_END_TIME"]))
        self.end = min(ends, default=None)

    def within(self, seconds: float) -> bool:
        """Whether it is less than `seconds` away."""
        return self.end is not None and time.time() + seconds > self.end
