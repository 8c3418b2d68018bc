"""A copy of tensors in host memory, kept from save to save."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

from megamoe.utils.host_memory import memory_limits

MEMORY_FACTOR = 1.25  # available memory over what the copies of a host's ranks take, at least
ALIGNMENT = 64  # bytes, of each tensor in the memory of all


class HostCopy:
    """Host memory for one list of tensors, kept from save to save: new memory costs more than the copying."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._buffers: list[Tensor] = []  # in the memory
        self._side: torch.cuda.Stream | None = None
        self._said = False
        self._is_refused = False  # to lock memory; tried once, for it takes a pass over all of it

    def take(self, tensors: list[Tensor], ready: torch.cuda.Event | None) -> list[Tensor] | None:
        """Copies of `tensors`; None if this host has too little memory for them. The next call overwrites them.

        Args:
            ready: on a GPU, recorded when the tensors had the values to be copied.
        """
        if self._is_refused:
            return None
        if [(t.shape, t.dtype) for t in tensors] != [(b.shape, b.dtype) for b in self._buffers]:
            self._free()
            if not self._allocate(tensors):
                return None
        if ready and self._side is None:
            self._side = torch.cuda.Stream()  # parallel to the forward pass, not queued behind it
        if self._side and ready:
            self._side.wait_event(ready)
        with torch.cuda.stream(self._side):
            for buffer, tensor in zip(self._buffers, tensors, strict=True):
                buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if self._side:
            self._side.synchronize()
        return self._buffers

    def _allocate(self, tensors: list[Tensor]) -> bool:
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size()
        needed = sum(sizes) * int(ranks_here)
        if needed * MEMORY_FACTOR > memory_limits()[1]:
            self._say_no(needed)
            return False
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        if any(tensor.is_cuda for tensor in tensors):
            memory.zero_()  # or the driver would make each page of it, while training waits to launch
            try:
                # The memory as it is: torch's own page-locked memory comes in powers of two.
                pin_memory(memory.data_ptr(), memory.nbytes)
            except RuntimeError:  # memory that is free need not be free to be page-locked
                self._is_refused = True
                self._say_no(needed)
                return False
        self._memory = memory
        self._buffers = [
            piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, piece in zip(tensors, memory.split(sizes), strict=True)
        ]
        return True

    def _free(self) -> None:
        if self._memory is not None and self._memory.is_pinned():
            unpin_memory(self._memory.data_ptr())
        self._memory, self._buffers = None, []

    def _say_no(self, needed: int) -> None:
        if not self._said and dist.get_rank() == 0:
            print(
                f"no memory for copies of what is saved ({needed / 1e9:.1f} GB on this host): training waits for the "
                "files of a checkpoint",
                flush=True,
            )
        self._said = True
