"""Rows on their way to experts and back: laid out by expert, gathered, combined.

Shape legend: T tokens on this rank, D hidden_size, K choices, R rows, P places, fill included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
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


def gather_rows(x: Tensor, row: Tensor, place: Tensor, groups: int | Tensor) -> Tensor:
    """x (rows, D) -> (P, D), the row `row[p]` at each place p.

    Args:
        place: the places of each row, one row after the other; the gradients of other places are left out.
        groups: how many of them each row has; or where those of each begin, (rows,).
    """
    return _GatherRows.apply(x, row, place, groups)


class _GatherRows(torch.autograd.Function):
    """Backward gathers too, where torch's would add to rows in memory, one after the other."""

    @staticmethod
    def forward(ctx, x: Tensor, row: Tensor, place: Tensor, groups: int | Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(place, groups if isinstance(groups, Tensor) else None)
        ctx.groups = None if isinstance(groups, Tensor) else groups
        return x.index_select(0, row)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        place, starts = ctx.saved_tensors
        return _sums(grad, place, ctx.groups if starts is None else starts), None, None, None


def _sums(rows: Tensor, place: Tensor, groups: int | Tensor, factors: Tensor | None = None) -> Tensor:
    """The sums of the rows at the places of each group, times their factors; `place` and `groups` as in
    `gather_rows`."""
    if isinstance(groups, Tensor):
        return F.embedding_bag(place, rows, groups, mode="sum", per_sample_weights=factors)
    rows = rows.index_select(0, place).view(-1, groups, rows.shape[1])
    return (rows if factors is None else rows * factors.view(-1, groups, 1)).sum(1)


def sum_rows(rows: Tensor, row: Tensor, place: Tensor, groups: int | Tensor) -> Tensor:
    """rows (P, D) -> (rows, D), the sums of those at each row's places: `gather_rows` the other way."""
    return _SumRows.apply(rows, row, place, groups)


class _SumRows(torch.autograd.Function):
    """Saves no tensor: a block that is recomputed need not come as far as this then."""

    @staticmethod
    def forward(ctx, rows: Tensor, row: Tensor, place: Tensor, groups: int | Tensor) -> Tensor:  # type: ignore[override]
        ctx.row = row
        return _sums(rows, place, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, ctx.row), None, None, None


def spread_rows(rows: Tensor, place: Tensor, size: int) -> Tensor:
    """rows (U, D) -> (size, D), each at its place, and 0 elsewhere."""
    return _SpreadRows.apply(rows, place, size)


class _SpreadRows(torch.autograd.Function):
    """Saves no tensor, as `_SumRows`: else a rank with padding would recompute as far as here, and one without would
    not; their collectives would differ."""

    @staticmethod
    def forward(ctx, rows: Tensor, place: Tensor, size: int) -> Tensor:  # type: ignore[override]
        ctx.place = place
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, place, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, ctx.place), None, None


def combine_rows(results: Tensor, weights: Tensor, token: Tensor, place: Tensor, groups: int | Tensor) -> Tensor:
    """The weighted sum of each token's results, (T, D).

    Args:
        results: (P, D), of the experts.
        weights: of each token's results, as many as in `place`.
        token: (P,), the token at each place.
        place: the places of each token's results, one token after the other.
        groups: as in `gather_rows`.
    """
    if isinstance(groups, Tensor):  # what a compiler does not see
        torch._check(weights.numel() == place.numel())
        torch._check(token.shape[0] == results.shape[0])
    return _CombineRows.apply(results, weights, token, place, groups)


class _CombineRows(torch.autograd.Function):
    """Keeps the results and the indices alone: neither the weighted rows nor the rows in the tokens' order."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, results: Tensor, weights: Tensor, token: Tensor, place: Tensor, groups: int | Tensor
    ) -> Tensor:
        factors = weights.flatten().to(results.dtype)
        ctx.save_for_backward(results, factors, token, place)
        ctx.like = weights.shape, weights.dtype
        return _sums(results, place, groups, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        results, factors, token, place = ctx.saved_tensors
        shape, dtype = ctx.like
        grads = grad.index_select(0, token)
        by_place = (grads * results).sum(-1, dtype=dtype)
        by_weight = by_place.index_select(0, place).view(shape)
        # 0 at fill, so that its rows add nothing to the experts' gradients.
        factor_at = grad.new_zeros(len(token)).index_copy_(0, place, factors)
        return grads.mul_(factor_at.unsqueeze(-1)), by_weight, None, None, None
