"""The exit codes of a run. Imports no torch: what starts the ranks reads them too."""

from __future__ import annotations

import signal

FAILED = 1  # an error of the program, or of what it runs on: disk, network
REFUSED = 2  # what the user must change
STOPPED = 75  # saved and left early: EX_TEMPFAIL of sysexits.h
LOST = 76  # another rank died, or no rank makes progress
INTERRUPTED = 128 + signal.SIGINT

RESUME = "; resume from the last checkpoint with --resume."  # ends the message of a failure


class Stopped(Exception):
    """The run was asked to stop before there was anything to save."""
