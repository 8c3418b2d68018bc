"""How a rank leaves, with which exit code."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import DistError
from torch.distributed.distributed_c10d import _abort_process_group

from megamoe.launch.codes import FAILED, INTERRUPTED, REFUSED, STOPPED, Stopped
from megamoe.launch.rank_info import RANK_ON_HOST
from megamoe.utils.bounded import within
from megamoe.utils.errors import PeerError, UserError, first_line

END_SECONDS = 5  # for the process groups to end


def code_of(error: BaseException) -> int:
    """The code with which a rank leaves for `error`, and all others with it."""
    if isinstance(error, UserError) and not isinstance(error, PeerError):
        return REFUSED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return STOPPED if isinstance(error, Stopped) else FAILED


def message_of(error: BaseException) -> str:
    """What is said of `error`: a stack trace for a bug only."""
    if isinstance(error, UserError):
        return "\n".join(f"error: {problem}" for problem in error.problems)
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        return str(error)
    if isinstance(error, (OSError, DistError)):
        host = socket.gethostname()
        return f"error: {host} failed ({first_line(error)}); see that its network and disks answer, and start again."
    return "".join(traceback.format_exception(error)).rstrip()


def end_groups(failed: bool = False) -> None:
    """Destroy the process groups, or abort them where this rank has `failed`, so that no collective runs on.

    Returns within END_SECONDS: NCCL may wait for a rank that never comes, and `leave` ends the process all the same.
    """

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def end() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread's is the first, where NCCL would take memory
        (_abort_process_group if failed else dist.destroy_process_group)()

    within(END_SECONDS, end)


def leave(code: int) -> NoReturn:
    """End this process at once, whatever its threads do.

    The launchers do not pass every code on, so the first rank of a host leaves it in the file that the launch script
    names. torchrun would start ranks again that exit with any other code than 0, also those that were asked to stop.
    """
    note = os.environ.get("MEGAMOE_EXIT_NOTE")
    if note and os.environ.get(RANK_ON_HOST, os.environ.get("LOCAL_RANK", "0")) == "0":
        with contextlib.suppress(OSError):  # the script has gone, and its file
            Path(note).write_text(f"{code}\n")
    os._exit(0 if note and code == STOPPED and "TORCHELASTIC_RUN_ID" in os.environ else code)
