"""What a rank sets up where it trains on CPU: threads, allocator, compiled operators."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from megamoe.errors import UserError

STALE_LOCK_MINUTES = 10
# Operators that a run can make DeepSpeed compile.
COMPILED = ("cpu_adam", "cpu_lion", "fused_adam", "fused_lion")
# Of glibc's malloc.h; -1 as the threshold is the largest there is.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def share_cores() -> str:
    """Give this rank its share of the cores as threads, and keep freed memory for it. Returns a description of it."""
    if "OMP_NUM_THREADS" not in os.environ:
        # Each rank would start as many threads as there are cores.
        local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // local_ranks, 1))
    kept = "freed memory kept" if keep_freed_memory() else "allocator as it is"
    threads = torch.get_num_threads()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'} per rank, {kept}"


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones; returns whether it does.

    It would give every large tensor back to the system, which has to clear the pages of the next one, on every step.
    Left alone where the allocator is another one, or settings for it are in the environment.
    """
    settings = os.environ.get("LD_PRELOAD", "") + os.environ.get("GLIBC_TUNABLES", "")
    chosen = "malloc" in settings or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if chosen or mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Hand what glibc keeps of freed memory to the system, once: building an engine frees more than training reuses."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def refuse_stale_lock() -> None:
    """Raise UserError where a killed start has left torch's lock on an operator that DeepSpeed compiles: torch would
    wait for it without end and without a message."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (lock for lock in root.glob("**/lock") if lock.parent.name in COMPILED):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > STALE_LOCK_MINUTES:
            raise UserError(
                f"{lock} is {minutes:.0f} minutes old, above the {STALE_LOCK_MINUTES} that a compilation takes at "
                "most: a start was killed while it compiled; remove that file and start again."
            )
