"""The Mixture-of-Experts layer: DeepSpeed's MoE with megamoe's router, stacked experts and a dropless dispatch.

Being a subclass of `deepspeed.moe.layer.MoE`, the engine treats it as its own: expert groups, gradient averaging over
expert-data-parallel ranks. Only the way tokens travel differs: every token reaches its K experts, blocks are as long as
the routing makes them, and ranks exchange exactly that many rows.

Shape legend: T tokens on this rank, D hidden_size, E experts, K choices.
"""

from __future__ import annotations

import contextlib
from typing import Any

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.host_values import host_values
from megamoe.model.dispatch import (
    all_to_all,
    combine_rows,
    gather_rows,
    lay_out,
    lay_out_received,
    pick_rows,
    row_multiple,
)
from megamoe.model.router import Router
from megamoe.topology import ExpertTopology


class DroplessDispatch(nn.Module):
    """Sends every token to its experts and brings the weighted results back; stands in for DeepSpeed's MOELayer."""

    def __init__(self, router: Router, experts: nn.Module, topology: ExpertTopology):
        super().__init__()
        self.router = router
        self.experts = experts
        self.topology = topology
        self.ep_group: dist.ProcessGroup | None = None

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:  # called by DeepSpeed's MoE
        self.ep_group = ep_group

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> (the experts' weighted sum (T, D), tokens routed to each expert (E,) int64)."""
        weights, expert_ids, counts = self.router(x)  # (T, K), (T, K), (E,)
        run = self._local if self.topology.ep_size == 1 else self._exchange
        return run(x, weights, expert_ids.flatten(), counts), counts

    def _local(self, x: Tensor, weights: Tensor, slots: Tensor, counts: Tensor) -> Tensor:
        """All experts are here.

        Args:
            slots: (T * K,), the expert of each slot.
        """
        layout = lay_out(slots, counts, row_multiple(x.device))
        token = layout.row // weights.shape[1]
        results = self.experts(gather_rows(x, token, layout.place), layout.ends)
        return combine_rows(results, weights, token, layout.place)

    def _exchange(self, x: Tensor, weights: Tensor, slots: Tensor, counts: Tensor) -> Tensor:
        """Send each slot's row to the rank of its expert, run it there, and bring the result back."""
        send_counts = counts.view(self.topology.ep_size, self.topology.experts_per_rank)
        # A fake process group may leave it as it is (torch's did before it copied): there, every peer seems to send
        # what this rank sends.
        receive_counts = send_counts.clone()
        dist.all_to_all_single(receive_counts, send_counts, group=self.ep_group)
        splits = host_values(torch.stack((send_counts, receive_counts)).sum(-1))
        # What does not need them is done while they are on their way.
        layout = lay_out(slots, counts)
        token = layout.row // weights.shape[1]
        rows = gather_rows(x, token, layout.place)
        send, receive = splits()  # the one wait of a layer

        # One name for the rows on their way, so that none outlive their use.
        rows = all_to_all(rows, send, receive, self.ep_group)
        here = lay_out_received(receive_counts, len(rows), row_multiple(x.device))
        rows = gather_rows(rows, here.row, here.place)
        rows = self.experts(rows, here.ends)
        rows = pick_rows(rows, here.place)
        rows = all_to_all(rows, receive, send, self.ep_group)
        return combine_rows(rows, weights, token, layout.place)


class MoE(deepspeed.moe.layer.MoE):
    """DeepSpeed's MoE layer with `DroplessDispatch` inside."""

    deepspeed_moe: Any

    def __init__(self, *, router: Router, experts: nn.Module, topology: ExpertTopology, hidden_size: int):
        """
        Args:
            experts: those of this rank, stacked: (rows (P, D) by expert, ends (E,)) -> (P, D).
        """
        # DeepSpeed copies what it is given for each expert: nothing with parameters.
        super().__init__(hidden_size, nn.Identity(), num_experts=topology.num_experts, ep_size=topology.ep_size)
        for weight in experts.parameters():  # how the engine tells them from shared ones (deepspeed/moe/experts.py)
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.deepspeed_moe = DroplessDispatch(router, experts, topology)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make the groups of ranks, without the line that DeepSpeed prints on every rank."""
        with contextlib.redirect_stdout(None):
            super().set_deepspeed_parallelism(use_data_before_expert_parallel_)

    @property
    def router(self) -> Router:
        return self.deepspeed_moe.router

    @property
    def experts(self) -> nn.Module:
        """This rank's, in the order of `topology.expert_ids`."""
        return self.deepspeed_moe.experts

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
