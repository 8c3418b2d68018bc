"""Rows between the ranks that share experts: one row for each rank that a token goes to, while other work goes on.

A token with several experts on one rank is sent there once. A slot, one of its choices, travels apart, as a weight and
an expert; the rank that holds the experts weighs their results, adds them up and sends one row back.

Shape legend: T tokens on this rank, D hidden_size, K choices, R slots (T * K), U rows sent or received, N ranks of the
expert-parallel group, L experts of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.model.dispatch import Layout, lay_out
from megamoe.model.topology import ExpertTopology
from megamoe.utils.device_reads import begin_read


class Sends(NamedTuple):
    """What a rank sends, by rank, and to each rank in the order of the tokens. Of U the host knows nothing yet."""

    slot: Tensor  # (R,), in the order in which they are sent
    code: Tensor  # (R,): of each sent slot, the expert's number on its rank, and L more at the first of a row
    token: Tensor  # (R,): the token of each row; U are used
    place: Tensor  # (R,): the rows of each token, one token after the other; U are used
    starts: Tensor  # (T,): where those of each token begin
    rows: Tensor  # (N,): rows for each rank


def lay_out_sends(expert_ids: Tensor, topology: ExpertTopology) -> Sends:
    """Lay out the slots of tokens by rank; `expert_ids` is (T, K)."""
    tokens, choices = expert_ids.shape
    experts = topology.experts_per_rank
    owner, slot = (expert_ids // experts).flatten().sort(stable=True)
    token = slot // choices
    key = torch.add(token, owner, alpha=tokens)
    is_first = torch.ones_like(key)
    is_first[1:] = key[1:] != key[:-1]
    row = is_first.cumsum(0) - 1
    # Of each row the first slot, by token: less than 0.
    by_token, order = torch.sub(token, is_first, alpha=tokens).sort(stable=True)
    expert = expert_ids.flatten().index_select(0, slot) % experts
    return Sends(
        slot,
        torch.add(expert, is_first, alpha=experts),
        torch.zeros_like(row).scatter_(0, row, token),
        row.index_select(0, order),
        torch.searchsorted(by_token, torch.arange(-tokens, 0, device=row.device)),
        row.new_zeros(topology.ep_size).scatter_add_(0, owner, is_first),
    )


def lay_out_received(slots: Tensor, counts: Tensor, rows: int, multiple: int) -> tuple[Tensor, Layout, Tensor]:
    """Lay out received slots by expert. Returns their weights (R,), how they lie, by received row, and where the slots
    of each row begin, (U,).

    Args:
        slots: (R, 2), their weights and codes, as in `Sends`.
        counts: (L,), slots of each expert.
        rows: U.
        multiple: as in `lay_out`.
    """
    weights, code = slots.unbind(1)
    code = code.detach().long()
    layout = lay_out(code % len(counts), counts, multiple)
    row = (code >= len(counts)).cumsum(0) - 1
    starts = torch.searchsorted(row, torch.arange(rows, device=row.device))
    return weights, layout._replace(row=row.index_select(0, layout.row)), starts


class AllToAll:
    """One all-to-all of as many rows to and from each rank, and of their gradients the other way: begun where they are
    there, and waited for where they are used. Collective, each."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup | None, is_last: bool = False):
        """
        Args:
            is_last: of its block, which keeps nothing for backward of what follows, and so is not recomputed that far.
        """
        self.send, self.receive, self.group, self.is_last = send, receive, group, is_last
        self._begun: tuple[Any, Tensor] | None = None  # a handle, and what it fills

    def begin(self, rows: Tensor) -> Tensor:
        """Send rows (sum of `send`, ...); what is returned, (sum of `receive`, ...), is for `finish` alone."""
        return _Begin.apply(rows, self)

    def finish(self, received: Tensor) -> Tensor:
        """The rows that have come. Autograd runs what was made later first: the gradients travel during the backward
        pass of what was computed since `begin`."""
        return _Finish.apply(received, self)

    def start(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        size = sum(receive), *rows.shape[1:]
        # What `new_empty` makes is kept where a block is recomputed selectively, and so is what comes into it.
        received = torch.empty(size, dtype=rows.dtype, device=rows.device) if self.is_last else rows.new_empty(size)
        work = dist.all_to_all_single(received, rows.contiguous(), receive, send, group=self.group, async_op=True)
        self._begun = work, received
        return received

    def wait(self) -> Tensor:
        assert self._begun is not None
        (work, received), self._begun = self._begun, None
        work.wait()
        return received


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, way: AllToAll) -> Tensor:  # type: ignore[override]
        ctx.way = way
        return way.start(rows, way.send, way.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, sent: Tensor):  # type: ignore[override]
        return ctx.way.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received: Tensor, way: AllToAll) -> Tensor:  # type: ignore[override]
        ctx.way = way
        return way.wait().view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        ctx.way.start(grad, ctx.way.receive, ctx.way.send)
        return grad, None  # of the shape that autograd asks for; `_Begin` takes what has come


def exchange_counts(
    counts: Tensor, rows: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Callable[[], tuple[AllToAll, AllToAll]]]:
    """Tell the other ranks how many slots for each expert, (N * L,), and rows, (N,), they get. Collective.

    Returns the slots for each expert of this rank, (L,), and what waits for the counts and gives the all-to-alls of
    slots and of rows.
    """
    send = torch.cat((counts.view(len(rows), -1), rows.unsqueeze(1)), 1)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    read = begin_read(torch.stack((send, receive)))

    def ways() -> tuple[AllToAll, AllToAll]:
        both = read()
        slots, rows = ([[sum(one[of]) for one in way] for way in both] for of in (slice(-1), slice(-1, None)))
        return AllToAll(slots[0], slots[1], group), AllToAll(rows[0], rows[1], group)

    return receive[:, :-1].sum(0), ways
