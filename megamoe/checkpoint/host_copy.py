"""A copy of tensors in host memory, kept from save to save."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

MEMORY_FACTOR = 1.25  # available memory over what the copies of a host's ranks take, at least


class HostCopy:
    """Host memory for one list of tensors, kept from save to save: new memory costs more than the copying."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, tensors: list[Tensor]) -> list[Tensor] | None:
        """Copies of `tensors`; None if this host has too little memory for them. The next call overwrites them."""
        if [(t.shape, t.dtype) for t in tensors] != [(b.shape, b.dtype) for b in self._buffers]:
            self._buffers = []
            ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size()
            needed = sum(tensor.nbytes for tensor in tensors) * int(ranks_here)
            if needed * MEMORY_FACTOR > available_memory():
                return None
            try:
                self._buffers = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
            except RuntimeError:  # memory that is free need not be free to be pinned
                return None
        on_gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        side = torch.cuda.Stream(on_gpu) if on_gpu else None  # parallel to the forward pass, not queued behind it
        if side:
            side.wait_stream(torch.cuda.current_stream(on_gpu))
        with torch.cuda.stream(side):
            for buffer, tensor in zip(self._buffers, tensors, strict=True):
                buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if side:
            side.synchronize()
        return self._buffers


def available_memory() -> int:
    """Bytes that this process could still take: of the host, and of the control groups that it is in."""
    available = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        folder = root / line.split(":", 2)[2].lstrip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit there
                used = int((group / "memory.current").read_text())
                available = min(available, int((group / "memory.max").read_text()) - used)
    return available
