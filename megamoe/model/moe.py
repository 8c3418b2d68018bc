"""The Mixture-of-Experts layer: DeepSpeed's MoE with megamoe's router and a dropless dispatch.

Being a subclass of `deepspeed.moe.layer.MoE` with DeepSpeed's `Experts` inside, the engine treats it as its own: expert
groups, gradient averaging over expert-data-parallel ranks, one checkpoint file per expert. Only the way tokens travel
differs: every token reaches its K experts, blocks are as long as the routing makes them, and ranks exchange exactly
that many rows.

Shape legend: T tokens on this rank, D hidden_size, F intermediate_size, E experts, K choices, R rows after dispatch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from megamoe.model.names import local_experts
from megamoe.model.router import Router, count_ids
from megamoe.topology import ExpertTopology

# On CPU, oneDNN builds a kernel for every new matrix shape, and routing makes new shapes every step. Blocks rounded up
# to a multiple of this many rows recur. The fill is never more than this per expert.
CPU_ROW_MULTIPLE = 64


class Grouping(NamedTuple):
    """How rows are laid out so that each group's rows are one contiguous block."""

    source: Tensor  # (R,): the source row at each place; fill places repeat a source row and are read by nobody
    sizes: Tensor  # (groups,): rows of each group's block, fill included
    place: Tensor  # (rows,): the place of each source row


def group_rows(group_ids: Tensor, num_groups: int, multiple: int = 1) -> Grouping:
    """Lay out rows by group, in their order within a group, each block filled up to a multiple of `multiple` rows.

    Args:
        group_ids: (rows,), the group of each row.
    """
    counts = count_ids(group_ids, num_groups)
    order = group_ids.argsort(stable=True)
    padded = (counts + multiple - 1) // multiple * multiple
    # A row's place is its rank in the sorted order, moved by the fill of the blocks before its own.
    fill_before = (padded - counts).cumsum(0) - (padded - counts)
    places = torch.arange(len(order), device=order.device) + fill_before[group_ids[order]]
    source = order.new_zeros(len(order) if multiple == 1 else int(padded.sum()))
    source[places] = order
    place = torch.empty_like(order)
    place[order] = places
    return Grouping(source, padded, place)


class _AllToAll(torch.autograd.Function):
    """Rows to and from the ranks of a group, as many as the splits say; backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


class DroplessDispatch(nn.Module):
    """Sends every token to its experts and brings the weighted results back; stands in for DeepSpeed's MOELayer."""

    def __init__(self, router: Router, experts: Experts, topology: ExpertTopology):
        super().__init__()
        self.router = router
        self.experts = experts
        self.topology = topology
        self.ep_group: dist.ProcessGroup | None = None

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:  # called by DeepSpeed's MoE
        self.ep_group = ep_group

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> (the experts' weighted sum (T, D), tokens routed to each expert (E,) int64)."""
        weights, expert_ids = self.router(x)  # (T, K) each
        slots = expert_ids.flatten()  # (T * K,)
        rows = x.repeat_interleave(expert_ids.shape[1], dim=0)
        rows = self._local(rows, slots) if self.topology.ep_size == 1 else self._exchange(rows, slots)
        out = (rows.view(*expert_ids.shape, x.shape[1]) * weights.unsqueeze(-1).to(rows.dtype)).sum(1)
        return out, count_ids(slots, self.topology.num_experts)

    def _local(self, rows: Tensor, expert_ids: Tensor) -> Tensor:
        """Run rows through this rank's experts (ids from 0); results in the order of the rows."""
        experts = local_experts(self.experts)
        multiple = CPU_ROW_MULTIPLE if rows.device.type == "cpu" else 1
        grouping = group_rows(expert_ids, len(experts), multiple)
        sizes = grouping.sizes.tolist()  # on a GPU, the one wait of a layer without expert parallelism
        blocks = rows.index_select(0, grouping.source).split(sizes)
        # An expert without rows runs too: its parameters need their (zero) gradients, or ranks would reduce different
        # sets of gradients and hang.
        results = torch.cat([expert(block) for expert, block in zip(experts, blocks, strict=True)])
        return results.index_select(0, grouping.place)

    def _exchange(self, rows: Tensor, expert_ids: Tensor) -> Tensor:
        """Send each row to the rank of its expert, run it there, and bring the result back."""
        ep_size, num_local = self.topology.ep_size, self.topology.experts_per_rank
        outgoing = group_rows(expert_ids, self.topology.num_experts)
        send_counts = outgoing.sizes.view(ep_size, num_local)
        # (source rank, local expert). A fake process group may leave it as it is (torch's did before it copied):
        # there, every peer seems to send what this rank sends.
        receive_counts = send_counts.clone()
        dist.all_to_all_single(receive_counts, send_counts, group=self.ep_group)
        send_splits, receive_splits = torch.stack((send_counts.sum(1), receive_counts.sum(1))).tolist()

        received = _AllToAll.apply(rows.index_select(0, outgoing.source), send_splits, receive_splits, self.ep_group)
        local_ids = torch.arange(num_local, device=rows.device).repeat(ep_size)
        local_ids = local_ids.repeat_interleave(receive_counts.flatten(), output_size=len(received))
        results = self._local(received, local_ids)
        returned = _AllToAll.apply(results, receive_splits, send_splits, self.ep_group)
        return returned.index_select(0, outgoing.place)


class MoE(deepspeed.moe.layer.MoE):
    """DeepSpeed's MoE layer with `DroplessDispatch` inside."""

    deepspeed_moe: Any

    def __init__(self, *, router: Router, expert: nn.Module, topology: ExpertTopology, hidden_size: int):
        """
        Args:
            expert: one expert, (rows, D) -> (rows, D); DeepSpeed copies it for each expert of this rank.
        """
        super().__init__(hidden_size, expert, num_experts=topology.num_experts, ep_size=topology.ep_size)
        # What the engine looks for is kept: this class, the group names, the experts' place inside.
        self.deepspeed_moe = DroplessDispatch(router, self.deepspeed_moe.experts, topology)

    @property
    def router(self) -> Router:
        return self.deepspeed_moe.router

    @property
    def local_experts(self) -> nn.ModuleList:
        """This rank's experts, in the order of `topology.expert_ids`."""
        return local_experts(self.deepspeed_moe.experts)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """DeepSpeed's contract: (..., D) -> (output (..., D), auxiliary loss, tokens per expert (E,)).

        Args:
            used_token: (...) bool; tokens where it is False reach no expert, are not counted, and give 0.

        The auxiliary loss is always 0: the balance comes from the router's bias.
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if used_token is None:
            out, counts = self.deepspeed_moe(rows)
        else:
            used = used_token.flatten().nonzero().squeeze(1)
            out, counts = self.deepspeed_moe(rows.index_select(0, used))
            out = torch.zeros_like(rows).index_copy(0, used, out)
        return out.view_as(hidden_states), hidden_states.new_zeros(()), counts
