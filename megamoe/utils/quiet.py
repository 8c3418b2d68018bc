"""What DeepSpeed prints at its start. Imports neither it nor torch, so that a program can call this first."""

from __future__ import annotations

import logging


def quiet_deepspeed() -> None:
    """Let DeepSpeed's logger print errors alone: not, say, that there is no GPU, which a run says by itself."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
