"""Start the ranks of one host, hand them the signals that this process gets, and leave none of them behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from megamoe.launch.codes import INTERRUPTED, REFUSED, STOPPED
from megamoe.launch.holders import pid_space
from megamoe.launch.network import free_port
from megamoe.launch.rank_info import RankInfo
from megamoe.launch.stopping import REQUESTS, SAME_INTERRUPT_SECONDS
from megamoe.utils.errors import UserError

POLL_SECONDS = 0.1
END_SECONDS = 30  # for the others to end after a rank has failed: they detect it, say so and leave


def default_ranks() -> int:
    """One for each device that this process sees, or two on a host without any."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 2
    import torch  # takes seconds, and only this needs it

    return torch.accelerator.device_count() or 2


def run_ranks(
    words: list[str], number: int, shown: Callable[[], AbstractContextManager[int | None]] = contextlib.nullcontext
) -> int:
    """Run `python WORDS` as each of the ranks; returns the exit code of the run, and prints an error where it failed.

    SIGINT, SIGTERM, SIGHUP or SIGUSR1 has all ranks save and exit; a second one kills them. When this process is
    killed, they save and exit too (`launch/holders.py`). To be called on the main thread. Raises UserError.

    Args:
        shown: entered while they run; gives the descriptor that they write to, in place of this process's terminal.
    """
    given = os.environ.get("MASTER_PORT", "")
    if given and not given.isdecimal():
        raise UserError(f"MASTER_PORT is {given!r}; give the number of a free port, or leave it out.")
    port = int(given or free_port())
    # Without TORCH_CPP_LOG_LEVEL, each rank that loses rank 0 prints a stack trace of torch's store.
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "MEGAMOE_SCRIPT": f"{os.getpid()},{pid_space()}"}
    ranks: list[subprocess.Popen[bytes]] = []
    signals: list[float] = []  # when each came
    # Before the first rank is started: a signal that comes between two is handed on by `wait`.
    requests = [request for request in REQUESTS if signal.getsignal(request) is not signal.SIG_IGN]
    before = [signal.signal(request, lambda *_: signals.append(time.monotonic())) for request in requests]
    try:
        with shown() as output:
            for rank in range(number):
                rank_info = RankInfo(rank, number, rank, number, "127.0.0.1", port, "none")
                # In a session of its own: the terminal's Ctrl-C comes here alone, and is forwarded.
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-u", *words], env={**environment, **rank_info.environment()},
                        stdin=subprocess.DEVNULL, stdout=output, start_new_session=True,
                        stderr=output if sys.stderr.isatty() else None,
                    )
                )  # fmt: skip
            ends = wait(ranks, signals)
            kill(ranks)  # also compilers and other processes of theirs, which hold the output open
    finally:
        kill(ranks)
        for request, handler in zip(requests, before, strict=True):
            signal.signal(request, handler)
    code = max(ends) if max(ends) > 0 else 128 - min(ends) if min(ends) < 0 else 0
    # A rank that was loading Python, or that a second signal has killed.
    if signals and {-signal.SIGUSR1, -signal.SIGKILL if signals[1:] else None} & {*ends}:
        code = INTERRUPTED
    if code not in (0, REFUSED, STOPPED, INTERRUPTED):
        print(
            f"error: the ranks exited with code {code}; if no line above says why, they were killed (out of memory?); "
            "start again, a run with --resume.",
            file=sys.stderr,
        )
    return code


def wait(ranks: list[subprocess.Popen[bytes]], signals: list[float]) -> list[int]:
    """Until all have ended; returns their codes.

    Args:
        signals: when each request to stop has come, appended to by its handler.
    """
    failed: float | None = None  # when
    is_asked = False
    while None in (codes := [rank.poll() for rank in ranks]):
        if signals and not is_asked:
            for rank in ranks:
                rank.send_signal(signal.SIGUSR1)
            is_asked = True
        if failed is None and {*codes} - {None, 0, STOPPED}:
            failed = time.monotonic()
        is_repeated = bool(signals) and signals[-1] - signals[0] > SAME_INTERRUPT_SECONDS
        if is_repeated or (failed is not None and time.monotonic() - failed > END_SECONDS):
            kill(ranks)
        time.sleep(POLL_SECONDS)
    return [rank.returncode for rank in ranks]


def kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """And what they have started: each leads a process group."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
