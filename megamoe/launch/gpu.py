"""What a rank sets up where it trains on a GPU, before it touches one: the allocator."""

from __future__ import annotations

import os

SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # as torch reads them


def use_expandable_segments() -> str:
    """Let torch's allocator grow its segments, unless the user has set it up. Returns a description of it.

    Routing gives other sizes in every step, whose fragments would fill a GPU hours into a run. To be called before
    anything is allocated.
    """
    given = next((name for name in SETTINGS if name in os.environ), None)
    if given:
        return f"GPU, allocator as {given} sets it: {os.environ[given]}"
    os.environ[SETTINGS[0]] = "expandable_segments:True"
    return f"GPU, memory in expandable segments ({SETTINGS[0]} sets another)"
