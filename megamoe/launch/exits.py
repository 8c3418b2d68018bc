"""The exit codes of a run, and how a rank leaves with one."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import NoReturn

from megamoe.errors import PeerError, UserError

FAILED = 1  # an error of the program, or of what it runs on: disk, network
REFUSED = 2  # what the user must change
STOPPED = 75  # saved and left early: EX_TEMPFAIL of sysexits.h
LOST = 76  # another rank died, or no rank makes progress
INTERRUPTED = 128 + signal.SIGINT


class Stopped(Exception):
    """The run was asked to stop before there was anything to save."""


def code_of(error: BaseException) -> int:
    """The code with which all ranks leave for `error` of one of them."""
    if isinstance(error, UserError) and not isinstance(error, PeerError):
        return REFUSED
    return STOPPED if isinstance(error, Stopped) else FAILED


def leave(code: int) -> NoReturn:
    """End this process at once, whatever its threads do.

    The launchers do not pass every code on, so the first rank of a host leaves it in the file that the launch script
    names. torchrun would start ranks again that exit with any other code than 0, also those that were asked to stop.
    """
    note = os.environ.get("MEGAMOE_EXIT_NOTE")
    if note and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the script has gone, and its file
            Path(note).write_text(f"{code}\n")
    os._exit(0 if note and code == STOPPED and "TORCHELASTIC_RUN_ID" in os.environ else code)
