"""Count what runs without values: operators, GEMMs, bytes, and what is alive."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from megamoe.planning.meter import LiveBytes
from megamoe.planning.work import Gemm, Work

# Operators that make no kernel.
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "promote_types", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_reshape_alias",
}  # fmt: skip
# Operators that read or write a few places of their first tensor, which is left out of the bytes that they move.
PICKING = {"embedding", "gather", "scatter_", "scatter_add_"}


@dataclass(frozen=True)
class Event:
    """Bytes that are alive, by kind."""

    name: str
    peak: Counter[str]  # since the event before
    level: Counter[str]  # now


class Tracer(LiveBytes):
    """What is dispatched while it is entered, by phase; it gives the operators that read or need values their results.

    Args:
        fill: what the host reads where a tensor's number decides a shape: rows that the experts' blocks are filled up
            with.
    """

    def __init__(self, fill: int):
        super().__init__(counts_meta=True)
        self.fill = fill
        self.phase = "forward"  # of what is counted
        self.work: dict[str, Work] = defaultdict(Work)
        self.meanwhile: dict[str, Work] = defaultdict(Work)  # of `work`, during exchanges between ranks
        self.exchanges = 0  # that have begun and are not waited for
        self.events: dict[str, list[Event]] = {}  # by pass
        self._pass: list[Event] = []
        self.ran = True  # whether anything did in the last `as_one`
        self._is_paused = False

    def begin(self, name: str, kind: str) -> None:
        """A pass begins, in which bytes are of this kind."""
        self.phase, self.kind, self._pass = name, kind, []
        self.work[name], self.events[name] = Work(), self._pass
        self.restart()

    def mark(self, name: str, without: int = 0) -> None:
        """An event of this pass; `without` are bytes that are left out of its level."""
        level = Counter(self.held)
        level[self.kind] -= without
        self._pass.append(Event(name, self.peak_held, level))
        self.restart()

    def watch(self, module: nn.Module) -> None:
        """Leave out the bytes of a module's own tensors; mark the gradient of each parameter, and let go of it."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.ignore(tensor)
        for name, parameter in module.named_parameters():

            def came(parameter: Tensor, name: str = name) -> None:
                parameter.grad = None
                self.mark(name)

            parameter.register_post_accumulate_grad_hook(came)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What runs inside only stands for other parts of the model."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @contextmanager
    def as_one(self, *read: Tensor, flops: float | None = None) -> Iterator[list[Tensor]]:
        """Count what runs inside as one operator, which reads `read` and writes what is put into the list; of
        attention, where it has `flops`. Where all that it makes was kept from the forward pass, it does not run."""
        written: list[Tensor] = []
        self.ran = False
        with self.uncounted():
            yield written
        if not self.ran:
            return
        for work in self._counts():
            work.operators += 1
            if flops is None:
                work.bytes += _bytes((read, written))
            else:
                work.attention += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if name == "_local_scalar_dense":
            self.work[self.phase].operators += 1
            return self.fill
        out = super().__torch_dispatch__(_grouped if name == "_grouped_mm" else func, types, args, kwargs)
        if namespace == "aten" and name not in VIEWS:
            self.ran = True
            if not self._is_paused:
                for work in self._counts():
                    self._count(work, name, args, kwargs, out)
        return out

    def _counts(self) -> list[Work]:
        """Where what runs now is counted."""
        counts = [self.work[self.phase]]
        return [*counts, self.meanwhile[self.phase]] if self.exchanges else counts

    def _count(self, work: Work, name: str, args: Any, kwargs: Any, out: Any) -> None:
        work.operators += 1
        gemm = _gemm(name, args, out)
        if gemm:
            work.gemms[gemm] += 1
        elif name in PICKING:
            work.bytes += _bytes((args[1:], out if out is not args[0] else None))
        elif name == "copy_":  # which does not read its first tensor
            work.bytes += _bytes(args[:2])
        elif "empty" not in name:  # which writes nothing
            work.bytes += _bytes((args, kwargs, out))


def _bytes(tree: Any) -> int:
    return sum(one.numel() * one.element_size() for one in tree_iter(tree) if isinstance(one, Tensor))


def _gemm(name: str, args: Any, out: Any) -> Gemm | None:
    """The GEMM that an operator is."""
    if name in ("mm", "addmm"):
        left, right = args[-2:]
        return Gemm(left.shape[0], right.shape[1], left.shape[1])
    if name == "bmm":
        left, right = args
        return Gemm(left.shape[1], right.shape[2], left.shape[2], left.shape[0])
    if name == "_grouped_mm":
        left, right = args[:2]
        if right.dim() == 3:  # rows by group
            return Gemm(left.shape[0] / len(right), right.shape[2], right.shape[1], len(right))
        return Gemm(left.shape[0], right.shape[1], left.shape[1] / len(out), len(out))
    return None


def _grouped(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """As `_grouped_mm`, which takes bf16 alone without values."""
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(len(offs), left.shape[0], right.shape[1])
