"""Requests to stop a run before its last step: a signal, or the end of its time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from megamoe.launch.codes import INTERRUPTED, Stopped

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_INTERRUPT_SECONDS = 0.5  # a launcher may forward the Ctrl-C that the terminal has sent to all


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP requests a stop; the ranks share it at the end of a step, save and exit.

    A second Ctrl-C exits at once, whatever the main thread waits for. A SIGHUP that is ignored stays so: under nohup a
    run outlives its terminal. To be made on the main thread.
    """

    def __init__(self) -> None:
        self.asked = False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python runs a handler only when the main thread returns from a collective; the wake-up byte arrives at once.
        signal.set_wakeup_fd(writing)
        self._handled = [
            number for number in REQUESTS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ]
        self._handle(lambda *_: None)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, a request ends the processes that this one has started, compilers, and raises `Stopped`."""
        stopped = Stopped("stopped by a signal before the first step")

        def interrupt(*_: Any) -> None:
            self._handle(lambda *_: None)  # once
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            raise stopped

        self._handle(interrupt)
        try:
            if self.asked:
                raise stopped
            yield
        except RuntimeError:
            time.sleep(SAME_INTERRUPT_SECONDS)  # what has ended the compiler, and so failed it, may come here next
            raise
        finally:
            self._handle(lambda *_: None)

    def _handle(self, handler: Any) -> None:
        for number in self._handled:
            signal.signal(number, handler)

    def _listen(self, reading: int) -> None:
        first = None
        while True:
            number = os.read(reading, 1)[0]
            if number == signal.SIGINT:
                now = time.monotonic()
                first = first or now
                if now - first > SAME_INTERRUPT_SECONDS:
                    os._exit(INTERRUPTED)
            if number in REQUESTS:
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
