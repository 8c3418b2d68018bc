"""The Mixture-of-Experts layer: DeepSpeed's MoE with megamoe's router, stacked experts and a dropless dispatch.

Being a subclass of `deepspeed.moe.layer.MoE`, the engine treats it as its own: expert groups, gradient averaging over
expert-data-parallel ranks. Only the way tokens travel differs: every token reaches its K experts, blocks are as long as
the routing makes them, and the all-to-all between ranks has exactly that many rows.

Shape legend: T tokens on this rank, D hidden_size, E experts, K choices, P places, fill included, N ranks that share
the experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.model.all_to_all import AllToAll, Sends, exchange_counts, lay_out_received, lay_out_sends
from megamoe.model.dispatch import Layout, combine_rows, gather_rows, lay_out, row_multiple, spread_rows, sum_rows
from megamoe.model.router import Router
from megamoe.model.router_losses import Padding
from megamoe.model.topology import ExpertTopology

Experts = Callable[[Tensor, Tensor], Tensor]  # (rows (P, D) by expert, ends (E,)) -> (P, D)


class DroplessDispatch(nn.Module):
    """Sends every token to its experts and brings the weighted results back; stands in for DeepSpeed's MOELayer.

    Buffers:
        step_entropy: (), `sum_of_entropies` of this rank's tokens since the last optimizer step; not saved.
    """

    step_entropy: Tensor

    def __init__(self, router: Router, experts: nn.Module, topology: ExpertTopology):
        super().__init__()
        self.router = router
        self.experts = experts
        self.topology = topology
        self.ep_group: dist.ProcessGroup | None = None
        self.register_buffer("step_entropy", torch.zeros(()), persistent=False)

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:  # called by DeepSpeed's MoE
        self.ep_group = ep_group

    def forward(
        self,
        x: Tensor,
        num_sequences: int = 1,
        padding: Padding | None = None,
        alongside: Callable[[], Tensor | None] = lambda: None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(T, D) -> (the experts' weighted sum (T, D), the router's losses, tokens routed to each expert (E,) int64,
        what `alongside` gives).

        Args:
            num_sequences: that the tokens are of, and what `padding` they have, as for the router.
            alongside: is called while rows are on their way.
        """
        weights, expert_ids, counts, losses, log_scores, margins = self.router(x, num_sequences, padding)
        self.count_for_balancing(counts, sum_of_entropies(log_scores) if self.training else None, margins)
        del log_scores  # as large as the scores
        if self.topology.ep_size == 1:
            rows, layout = self.place(x, expert_ids, counts)
            results = self.experts(rows, layout.ends)
            out = combine_rows(results, weights, layout.row, layout.place, weights.shape[1])
            return out, losses, counts, alongside()
        sends = lay_out_sends(expert_ids, self.topology)
        out, other = self.run_on_ranks(x, weights, counts, sends, self.experts, alongside)
        return out, losses, counts, other

    def count_for_balancing(self, counts: Tensor, entropy: Tensor | None, margins: Tensor | None) -> None:
        """Add the slots of each expert, (E,), and in training the `sum_of_entropies`, and the `margin_histogram`, to
        those of the step."""
        # Inside a backward pass this is a recomputation: its slots were counted the first time.
        if entropy is not None and torch._C._current_graph_task_id() == -1:
            self.router.step_counts += counts
            self.step_entropy += entropy
            if margins is not None:
                assert self.router.step_margins is not None
                self.router.step_margins += margins

    def place(self, x: Tensor, expert_ids: Tensor, counts: Tensor) -> tuple[Tensor, Layout]:
        """The rows (P, D) of the tokens `x` (T, D) by expert, one for each choice, and how they lie, by token.

        Args:
            expert_ids: (T, K).
            counts: (E,), slots of each expert.
        """
        layout, choices = lay_out(expert_ids.flatten(), counts, row_multiple(x.device)), expert_ids.shape[1]
        layout = layout._replace(row=layout.row // choices)
        return gather_rows(x, layout.row, layout.place, choices), layout

    def run_on_ranks(
        self,
        x: Tensor,
        weights: Tensor,
        counts: Tensor,
        sends: Sends,
        experts: Experts,
        alongside: Callable[[], Any],
        combine: Callable[..., Tensor] = combine_rows,
    ) -> tuple[Tensor, Any]:
        """(The experts' weighted sum (T, D), what `alongside` gives), by the ranks that share the experts. Collective.

        Args:
            x: (T, D), with weights (T, K).
            counts: (E,), slots of each expert.
            alongside: is called while the rows of `x` are on their way, rather than those that come back: the host
                has waited just before, so the device has nothing else to do until what follows is launched.
            combine: `combine_rows`, which weighs and sums results where the experts are.
        """
        counts, ways = exchange_counts(counts, sends.rows, self.ep_group)
        sent = weights.flatten().index_select(0, sends.slot)
        sent = torch.stack((sent, sends.code.to(sent.dtype)), 1)  # small numbers, exact in any precision
        slots, rows = ways()  # the one wait of a layer

        back = AllToAll(rows.receive, rows.send, self.ep_group, is_last=True)
        coming_slots = slots.begin(sent)
        token, place = sends.token[: sum(rows.send)], sends.place[: sum(rows.send)]
        # One name for the rows on their way, so that none outlive their use.
        moved = rows.begin(gather_rows(x, token, place, sends.starts))
        factors, layout, starts = lay_out_received(
            slots.finish(coming_slots), counts, len(moved), row_multiple(x.device)
        )
        other = alongside()
        moved = gather_rows(rows.finish(moved), layout.row, layout.place, starts)
        moved = experts(moved, layout.ends)
        moved = combine(moved, factors, layout.row, layout.place, starts)
        moved = back.finish(back.begin(moved))
        return sum_rows(moved, token, place, sends.starts), other


def sum_of_entropies(log_scores: Tensor) -> Tensor:
    """The entropies of all tokens' scores, each token's divided by their sum, from their logarithms (T, E): () in
    nats."""
    return torch.special.entr(log_scores.detach().softmax(-1)).sum()


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

    def forward(
        self, hidden_states: Tensor, used: Tensor | None = None, alongside: Callable[[], Tensor | None] = lambda: None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """DeepSpeed's contract: (..., D) -> (output (..., D), auxiliary losses, tokens per expert (E,)).

        Args:
            hidden_states: of equally long sequences where it is (B, S, D), of one otherwise.
            used: (U,) int64, rising, of the tokens of all sequences one after another; the others reach no expert, are
                not counted, and give 0.
            alongside: gives what is added to the output, (..., D); computed while rows are on their way.

        The losses are those of `Routing`.
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        sequences = math.prod(hidden_states.shape[:-2])
        padding = None if used is None else Padding(used, len(rows))
        rows = rows if used is None else rows.index_select(0, used)
        out, losses, counts, added = self.deepspeed_moe(rows, sequences, padding, alongside)
        out = (out if padding is None else spread_rows(out, *padding)).view_as(hidden_states)
        return out if added is None else added + out, losses, counts
