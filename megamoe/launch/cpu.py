"""What a rank sets up where it trains on CPU: threads, allocator."""

from __future__ import annotations

import ctypes
import os

import torch

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
