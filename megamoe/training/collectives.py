"""What a rank sends in its steps, counted where torch's process groups take it: from megamoe and DeepSpeed alike."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import _CachedTorchDispatchMode

# The methods of a process group, each with its kind, as in `planning/traffic.py`, and the argument whose bytes are the
# payload: what is reduced, what is sent to all, what is gathered from all.
METHODS = {
    "allreduce": ("all_reduce", 0),
    "all_to_all_single": ("all_to_all", 1),
    "all_gather_single": ("all_gather", 0),
    "allgather": ("all_gather", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce_scatter_single": ("reduce_scatter", 1),
}


class Collectives(ExitStack):
    """Counts the collectives called under it, by kind and ranks of the group; it can be entered again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = 0  # how often
        self.calls: Counter[tuple[str, int]] = Counter()
        self.payload: Counter[tuple[str, int]] = Counter()  # bytes on this rank

    def __enter__(self) -> Collectives:
        self.entered += 1
        for name, of_method in METHODS.items():
            self.callback(setattr, ProcessGroup, name, vars(ProcessGroup)[name])  # `getattr` gives what binds no group
            setattr(ProcessGroup, name, self._counted(getattr(ProcessGroup, name), *of_method))
        return self

    def _counted(self, method: Any, kind: str, position: int) -> Any:
        def call(group: ProcessGroup, *args: Any, **options: Any) -> Any:
            if not _is_cached(args[0]):
                self.calls[kind, group.size()] += 1
                sent = (one.nbytes for one in tree_iter(args[position]) if isinstance(one, Tensor))
                self.payload[kind, group.size()] += sum(sent)
            return method(group, *args, **options)

        return call


def _is_cached(received: Any) -> bool:
    """Whether a selective recomputation takes the rows that were kept, by `model/recompute.py`, and sends nothing."""
    is_recomputed = any(isinstance(one, _CachedTorchDispatchMode) for one in _get_current_dispatch_mode_stack())
    return is_recomputed and received.is_floating_point()
