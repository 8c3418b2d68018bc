"""What Ctrl-C does to a program. Imports nothing else, so that a program can call it before its other imports."""

from __future__ import annotations

import signal
from typing import Any


def on_interrupt(handler: Any) -> None:
    """Let SIGINT do this, unless it is ignored: what a script runs in the background outlives the script's Ctrl-C.

    Args:
        handler: of `signal.signal`; SIG_DFL while modules are imported ends the process without a stack trace.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
