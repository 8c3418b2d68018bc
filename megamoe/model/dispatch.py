"""Rows on their way to experts and back: laid out by expert, gathered, sent between ranks (all-to-all), combined.

Shape legend: T tokens on this rank, D hidden_size, K choices, R slots (T * K) or received rows, P places, fill
included, E experts of this rank, N ranks of the expert-parallel group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# On CPU, oneDNN builds a kernel for every new matrix shape, and routing makes new shapes every step. Blocks rounded up
# to a multiple of this many rows recur. The fill is never more than this per expert.
CPU_ROW_MULTIPLE = 32


def row_multiple(device: torch.device) -> int:
    """What the rows of each expert are rounded up to."""
    return CPU_ROW_MULTIPLE if device.type == "cpu" else 1


class Layout(NamedTuple):
    """How rows are laid out so that each group's rows are one contiguous block."""

    row: Tensor  # (P,): the row at each place; at fill, one whose result is read by nobody
    place: Tensor  # (R,): the place of each row
    ends: Tensor  # (groups,) int32: where each group's block ends, fill included


def lay_out(group_ids: Tensor, counts: Tensor, multiple: int = 1) -> Layout:
    """Lay out rows by group, in their order within a group.

    Args:
        group_ids: (R,), the group of each row.
        counts: (groups,), rows of each group.
        multiple: each block is filled up to a multiple of so many rows; above 1 the host reads the device.
    """
    group, row = group_ids.sort(stable=True)
    place = torch.arange(len(row), device=row.device)  # of the sorted rows, without fill
    if multiple == 1:
        return Layout(row, torch.empty_like(row).scatter_(0, row, place), counts.cumsum(0, dtype=torch.int32))
    fill = -counts % multiple
    fill_ends = fill.cumsum(0)
    place += (fill_ends - fill).index_select(0, group)  # the fill of the blocks before
    filled = row.new_zeros(len(row) + int(fill_ends[-1])).scatter_(0, place, row)
    ends = (counts.cumsum(0) + fill_ends).to(torch.int32)
    return Layout(filled, torch.empty_like(row).scatter_(0, row, place), ends)


def lay_out_received(counts: Tensor, num_rows: int, multiple: int = 1) -> Layout:
    """Lay out rows that have arrived by rank, and from each rank by expert, by expert and then by rank.

    Args:
        counts: (N, E), rows from each rank for each expert; they sum to `num_rows`.
        multiple: as in `lay_out`.
    """
    ranks, experts = counts.shape
    arrived = torch.arange(experts, device=counts.device).repeat(ranks)
    return lay_out(arrived.repeat_interleave(counts.flatten(), output_size=num_rows), counts.sum(0), multiple)


def gather_rows(x: Tensor, row: Tensor, place: Tensor, choices: int = 1) -> Tensor:
    """x (rows, D) -> (P, D), the row `row[p]` at each place p.

    Args:
        place: (rows * K,), the K places of each row, one row after the other; the gradients of other places are left
            out.
        choices: K.
    """
    return _GatherRows.apply(x, row, place, choices)


class _GatherRows(torch.autograd.Function):
    """Backward gathers too, where torch's would add to rows in memory, one after the other."""

    @staticmethod
    def forward(ctx, x: Tensor, row: Tensor, place: Tensor, choices: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(place)
        ctx.choices = choices
        return x.index_select(0, row)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (place,) = ctx.saved_tensors
        grads = grad.index_select(0, place)
        if ctx.choices > 1:
            grads = grads.view(-1, ctx.choices, grad.shape[1]).sum(1)
        return grads, None, None, None


def pick_rows(results: Tensor, place: Tensor) -> Tensor:
    """results (P, D) -> (R, D), those at `place`; the gradients of the others, which are fill, are 0."""
    return _PickRows.apply(results, place)


class _PickRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, results: Tensor, place: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(place)
        ctx.places = len(results)
        return results.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, grad.shape[1]).index_copy_(0, place, grad), None


def combine_rows(results: Tensor, weights: Tensor, token: Tensor, place: Tensor) -> Tensor:
    """The weighted sum of each token's results, (T, D).

    Args:
        results: (P, D), of the experts.
        weights: (T, K).
        token: (P,), the token at each place.
        place: (T * K,), the places of each token's results.
    """
    return _CombineRows.apply(results, weights, token, place)


class _CombineRows(torch.autograd.Function):
    """Keeps the results and the indices alone: neither the weighted rows nor the rows in the tokens' order."""

    @staticmethod
    def forward(ctx, results: Tensor, weights: Tensor, token: Tensor, place: Tensor) -> Tensor:  # type: ignore[override]
        factors = weights.to(results.dtype)
        ctx.save_for_backward(results, factors, token, place)
        ctx.weights_dtype = weights.dtype
        rows = results.index_select(0, place).view(*weights.shape, results.shape[1])
        return (rows * factors.unsqueeze(-1)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        results, factors, token, place = ctx.saved_tensors
        grads = grad.index_select(0, token)
        by_place = (grads * results).sum(-1, dtype=ctx.weights_dtype)
        by_weight = by_place.index_select(0, place).view_as(factors)
        # 0 at fill, so that its rows add nothing to the experts' gradients.
        factor_at = grad.new_zeros(len(token)).index_copy_(0, place, factors.flatten())
        return grads.mul_(factor_at.unsqueeze(-1)), by_weight, None, None


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows to and from the ranks of a group, as many as the splits say. Collective."""
    return _AllToAll.apply(rows, send, receive, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:  # type: ignore[override]
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None
