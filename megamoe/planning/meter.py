"""Bytes of live tensors, measured operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor memory that operations under this mode have made and that is still referred to.

    A storage counts once however many tensors share it, from the operation that returned its first tensor until it is
    freed. Memory that a kernel takes and gives back within one operation is not counted, nor is what an allocator holds
    in reserve. Enter it before the model is built: tensors made earlier count only once an operation returns them.

    Args:
        counts_meta: count tensors of the meta device too, which have no memory.
    """

    def __init__(self, counts_meta: bool = False) -> None:
        super().__init__()
        self.kind = "tensors"  # of what is made from now on
        self.held: Counter[str] = Counter()  # by kind
        self.peak_held: Counter[str] = Counter()  # since the last `restart`
        self._counts_meta = counts_meta
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def now(self) -> int:
        return self.held.total()

    @property
    def peak(self) -> int:
        return self.peak_held.total()

    def restart(self) -> None:
        """Begin a new peak at what is live now."""
        self.peak_held = Counter(self.held)

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the bytes of a tensor that was made before."""
        self._see(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                has_memory = self._counts_meta or value.device.type != "meta"
                self._see(storage, has_memory * storage.nbytes())
        if self.now > self.peak:
            self.restart()
        return out

    def _see(self, storage: torch.UntypedStorage, size: int) -> None:
        # Torch gives one Python object per storage and keeps it while the storage lives, so its end is the storage's.
        key, kind = id(storage), self.kind
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            del self._seen[key]
            self.held[kind] -= size

        self._seen[key] = weakref.ref(storage, freed)
        self.held[kind] += size
