"""The router: which experts a token is sent to, and with what weights.

Selection uses score + bias, the combine weights use the scores alone. `training/balancing.py` moves the bias.
Sources: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv:2408.15664);
DeepSeek-V3 (arXiv:2412.19437) for groups and scaling, as transformers has them (`DeepseekV3TopkRouter`).

Shape legend: T tokens, D hidden_size, E experts, K choices per token, G groups of experts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .margins import BINS, bin_edges, margin_histogram
from .router_losses import Padding, RouterLosses


class Routing(NamedTuple):
    """What a router has decided."""

    weights: Tensor  # (T, K), at least fp32
    expert_ids: Tensor  # (T, K)
    counts: Tensor  # (E,) int64, slots of each expert
    losses: Tensor | None  # (2,), of `RouterLosses`; None without them and outside of training
    log_scores: Tensor  # (T, E), at least fp32: logarithms of the scores, but for a constant of each token
    margins: Tensor | None  # (N, E) int64, `margin_histogram`; None outside of training, or where they are not counted


class Router(nn.Module):
    """Chooses K experts for every token.

    Buffers (DeepSpeed keeps them in fp32 under bf16, and leaves them in the file of the non-expert weights because no
    name on their path but DeepSpeed's own contains "expert"):
        selection_bias: (E,), added to the scores for the selection only; None without `router_bias`.
        running_load: (E,), running mean of the share of slots each expert got; sums to 1.
        step_counts: (E,) int64, slots routed since the last optimizer step on this rank, as the layer adds them up; not
            saved.
        step_margins: (N, E) int64, tokens in each bin of each expert's margin since the last step on this rank, see
            `margins.py`, and margin_edges, (N - 1,), those of the bins; not saved, and None without `counts_margins`.
    """

    selection_bias: Tensor | None
    running_load: Tensor
    step_counts: Tensor
    step_margins: Tensor | None
    margin_edges: Tensor | None

    def __init__(
        self,
        *,
        hidden_size: int,
        num_local_experts: int,
        num_experts_per_tok: int,
        router_score: Literal["softmax", "sigmoid"] = "softmax",
        router_jitter_noise: float = 0.0,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        router_bias: bool = True,
        counts_margins: bool = False,
        losses: RouterLosses | None = None,
    ):
        """
        Args:
            norm_topk_prob: divide the weights of the chosen experts by their sum.
            routed_scaling_factor: of the weights, after that.
            n_group: G; each group has E / G consecutive experts, at least two if there are several.
            topk_group: the groups whose experts may be chosen: those with the largest sums of two scores.
            counts_margins: in training, for the bias; without groups only.
            losses: computed in training; None computes none.
        """
        super().__init__()
        self.top_k = num_experts_per_tok
        self.score = router_score
        self.jitter_noise = router_jitter_noise
        self.normalizes = norm_topk_prob
        self.scaling = routed_scaling_factor
        self.num_groups = n_group
        self.top_groups = topk_group
        self.losses = losses
        self.weight = nn.Parameter(torch.empty(num_local_experts, hidden_size))
        self.register_buffer("selection_bias", torch.zeros(num_local_experts) if router_bias else None)
        self.register_buffer("running_load", torch.full((num_local_experts,), 1.0 / num_local_experts))
        self.register_buffer("step_counts", torch.zeros(num_local_experts, dtype=torch.int64), persistent=False)
        margins = torch.zeros(BINS, num_local_experts, dtype=torch.int64) if counts_margins else None
        self.register_buffer("step_margins", margins, persistent=False)
        self.register_buffer("margin_edges", bin_edges() if counts_margins else None, persistent=False)

    def forward(self, x: Tensor, num_sequences: int = 1, padding: Padding | None = None) -> Routing:
        """Route tokens `x` (T, D).

        Args:
            num_sequences: that the tokens are of, equally long, one after the other; for the losses.
            padding: of the sequences, which no token here is of.
        """
        return self.route(self.logits(x), num_sequences, padding)

    def logits(self, x: Tensor) -> Tensor:
        """The logits (T, E) of tokens `x` (T, D), at least fp32 whatever their dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        if self.training and self.jitter_noise:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        return F.linear(x, self.weight.to(dtype))

    def route(self, logits: Tensor, num_sequences: int = 1, padding: Padding | None = None) -> Routing:
        """What `forward` makes of the logits (T, E)."""
        is_sigmoid = self.score == "sigmoid"
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
        log_scores = F.logsigmoid(logits) if is_sigmoid else logits  # but for a constant

        expert_ids, margins = self._choose(scores.detach())
        weights = self._weights(scores, log_scores, expert_ids)
        counts = count_ids(expert_ids.flatten(), self.step_counts.numel())
        losses = None
        if self.losses is not None and self.training:
            losses = self.losses(logits, log_scores, expert_ids, self.running_load, num_sequences, padding)
        return Routing(weights, expert_ids, counts, losses, log_scores, margins)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts (T, K) with the largest score + bias, out of the best groups, and the histogram of the margins;
        `scores` is (T, E)."""
        if self.selection_bias is not None:
            scores = scores + self.selection_bias
        if self.top_groups < self.num_groups:
            groups = scores.unflatten(-1, (self.num_groups, -1))  # (T, G, E / G)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            is_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            scores = groups.masked_fill(is_out.unsqueeze(-1), -torch.inf).flatten(-2)
        if self.margin_edges is None or not self.training:
            return scores.topk(self.top_k, dim=-1).indices, None
        best, ids = scores.topk(self.top_k + 1, dim=-1)
        return ids[:, :-1].contiguous(), margin_histogram(scores, best, self.margin_edges)

    def _weights(self, scores: Tensor, log_scores: Tensor, expert_ids: Tensor) -> Tensor:
        """Combine weights (T, K) by scores and their logarithms, (T, E)."""
        weights = (log_scores if self.normalizes else scores).gather(-1, expert_ids)
        if self.normalizes:  # divided by their sum, as a softmax of their logarithms: no score is too small for it
            weights = weights.softmax(-1)
        return weights if self.scaling == 1 else weights * self.scaling


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 stands in `ids`, (size,) int64. torch.bincount would wait for a GPU."""
    return ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids))
