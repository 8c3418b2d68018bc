"""The router: which experts a token is sent to, and with what weights.

Selection uses score + bias, the combine weights use the scores alone. `training/balancing.py` moves the bias.
Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv:2408.15664).

Shape legend: T tokens, D hidden_size, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Chooses K experts for every token.

    Buffers (DeepSpeed keeps them in fp32 under bf16, and leaves them in the file of the non-expert weights because no
    name on their path but DeepSpeed's own contains "expert"):
        selection_bias: (E,), added to the scores for the selection only.
        running_load: (E,), running mean of the share of slots each expert got; sums to 1.
        step_counts: (E,) int64, slots routed since the last optimizer step on this rank, as the layer adds them up; not
            saved.
    """

    selection_bias: Tensor
    running_load: Tensor
    step_counts: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        num_local_experts: int,
        num_experts_per_tok: int,
        router_score: Literal["softmax", "sigmoid"] = "softmax",
        router_jitter_noise: float = 0.0,
    ):
        super().__init__()
        self.top_k = num_experts_per_tok
        self.score = router_score
        self.jitter_noise = router_jitter_noise
        self.weight = nn.Parameter(torch.empty(num_local_experts, hidden_size))
        self.register_buffer("selection_bias", torch.zeros(num_local_experts))
        self.register_buffer("running_load", torch.full((num_local_experts,), 1.0 / num_local_experts))
        self.register_buffer("step_counts", torch.zeros(num_local_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens `x` (T, D); returns (combine weights (T, K), expert ids (T, K), slots per expert (E,) int64).

        Logits are at least fp32 whatever the dtype of `x`; the weights have the logits' dtype and sum to 1 over K.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        if self.training and self.jitter_noise:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        logits = F.linear(x, self.weight.to(dtype))
        scores = logits.detach().sigmoid() if self.score == "sigmoid" else logits.detach().softmax(-1)
        expert_ids = (scores + self.selection_bias).topk(self.top_k, dim=-1).indices
        # The chosen scores divided by their sum, as a softmax of their logarithms: no score is too small for it.
        log_scores = F.logsigmoid(logits) if self.score == "sigmoid" else logits
        weights = log_scores.gather(-1, expert_ids).softmax(-1)
        counts = count_ids(expert_ids.flatten(), self.step_counts.numel())
        return weights, expert_ids, counts


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 stands in `ids`, (size,) int64. torch.bincount would wait for a GPU."""
    return ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids))
