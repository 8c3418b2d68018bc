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
from typing import Any, NamedTuple

import deepspeed.moe.layer
import torch
import torch.distributed as dist
from torch import Tensor, nn

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
from megamoe.model.router_losses import Padding
from megamoe.model.topology import ExpertTopology
from megamoe.utils.device_reads import begin_read

Experts = Callable[[Tensor, Tensor], Tensor]  # (rows (P, D) by expert, ends (E,)) -> (P, D)


class Placed(NamedTuple):
    """The rows of this rank's tokens, by expert."""

    rows: Tensor  # (P, D)
    token: Tensor  # (P,): the token at each place
    place: Tensor  # (T * K,): the places of each token's rows
    ends: Tensor  # (E,) int32: where each expert's rows end, fill included


class Incoming(NamedTuple):
    """What the other ranks send."""

    counts: Tensor  # (N, E / N), rows from each rank for each expert of this one
    splits: Callable[[], Any]  # waits; the rows sent to each rank, and those received from each


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
        self, x: Tensor, num_sequences: int = 1, padding: Padding | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(T, D) -> (the experts' weighted sum (T, D), the router's losses, tokens routed to each expert (E,) int64).

        Args:
            num_sequences: that the tokens are of, and what `padding` they have, as for the router.
        """
        weights, expert_ids, counts, losses, log_scores, margins = self.router(x, num_sequences, padding)
        self.count_for_balancing(counts, sum_of_entropies(log_scores) if self.training else None, margins)
        del log_scores  # as large as the scores
        incoming = self.exchange_counts(counts)
        placed = self.place(x, expert_ids, counts)  # while the counts are on their way
        results = self.run_experts(placed, incoming, self.experts)
        return combine_rows(results, weights, placed.token, placed.place), losses, counts

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

    def exchange_counts(self, counts: Tensor) -> Incoming | None:
        """Tell the ranks that share experts how many slots (E,) this one has for each; None where each rank has all."""
        if self.topology.ep_size == 1:
            return None
        send_counts = counts.view(self.topology.ep_size, self.topology.experts_per_rank)
        # A fake process group may leave it as it is (torch's did before it copied): there, every peer seems to send
        # what this rank sends.
        receive_counts = send_counts.clone()
        dist.all_to_all_single(receive_counts, send_counts, group=self.ep_group)
        return Incoming(receive_counts, begin_read(torch.stack((send_counts, receive_counts)).sum(-1)))

    def place(self, x: Tensor, expert_ids: Tensor, counts: Tensor) -> Placed:
        """The rows of the tokens `x` (T, D) by expert, one for each choice.

        Args:
            expert_ids: (T, K).
            counts: (E,), slots of each expert.
        """
        multiple = row_multiple(x.device) if self.topology.ep_size == 1 else 1  # or they are multiplied elsewhere
        layout = lay_out(expert_ids.flatten(), counts, multiple)
        token = layout.row // expert_ids.shape[1]
        return Placed(gather_rows(x, token, layout.place, expert_ids.shape[1]), token, layout.place, layout.ends)

    def run_experts(self, placed: Placed, incoming: Incoming | None, experts: Experts) -> Tensor:
        """What the experts make of the rows, each in its row's place, (P, D). Collective, with `incoming`."""
        if incoming is None:
            return experts(placed.rows, placed.ends)
        send, receive = incoming.splits()  # the one wait of a layer

        # One name for the rows on their way, so that none outlive their use.
        rows = all_to_all(placed.rows, send, receive, self.ep_group)
        here = lay_out_received(incoming.counts, len(rows), row_multiple(rows.device))
        rows = gather_rows(rows, here.row, here.place)
        rows = experts(rows, here.ends)
        rows = pick_rows(rows, here.place)
        return all_to_all(rows, receive, send, self.ep_group)


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

    def forward(self, hidden_states: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """DeepSpeed's contract: (..., D) -> (output (..., D), auxiliary losses, tokens per expert (E,)).

        Args:
            hidden_states: of equally long sequences where it is (B, S, D), of one otherwise.
            used: (U,) int64, rising, of the tokens of all sequences one after another; the others reach no expert, are
                not counted, and give 0.

        The losses are those of `Routing`.
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        sequences = math.prod(hidden_states.shape[:-2])
        if used is None:
            out, losses, counts = self.deepspeed_moe(rows, sequences)
        else:
            padding = Padding(used, len(rows))
            out, losses, counts = self.deepspeed_moe(rows.index_select(0, used), sequences, padding)
            out = padding.with_zeros(out)
        return out.view_as(hidden_states), losses, counts
