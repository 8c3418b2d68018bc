"""What a step really uses: bytes of live tensors and payload of collectives, measured operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What c10d calls its operations, and where among the arguments the buffers stand whose bytes are the payload: what is
# reduced, what is sent to all, what is gathered from all.
_PAYLOADS = {
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}


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


class Collectives(TorchDispatchMode):
    """Adds up the payload of the collectives called under this mode: bytes on this rank, by kind and group size.

    The payload is the buffer that is reduced, the rows handed to an all-to-all (those that stay here included), the
    result of an all-gather.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in _PAYLOADS:
            kind, position = _PAYLOADS[name]
            group = next(value for value in args if isinstance(value, torch.ScriptObject) and _is_group(value))
            self.payload[kind, dist.ProcessGroup.unbox(group).size()] += sum(
                value.numel() * value.element_size() for value in tree_iter(args[position]) if isinstance(value, Tensor)
            )
        return func(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return str(value._type()).endswith("ProcessGroup")
