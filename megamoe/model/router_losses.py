"""Losses on a router's scores: the balance of the experts' load, and the z-loss that keeps logits small.

Sources: DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20) for "sequence", Switch Transformer (arXiv:2101.03961,
equations 4 to 6) for "micro_batch", ST-MoE (arXiv:2202.08906, equation 5) for the z-loss.

Shape legend: T tokens, E experts, K choices per token, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BalanceLoss = Literal["sequence", "global_batch", "micro_batch"]


class Padding(NamedTuple):
    """Of sequences some of whose tokens are left out."""

    used: Tensor  # (T,) int64, rising: the positions, of all sequences, that are not
    positions: int  # of all sequences, with those left out; the means are over them, the same for any split of a batch

    def with_zeros(self, x: Tensor) -> Tensor:
        """x (T, ...) -> (positions, ...)."""
        return x.new_zeros(self.positions, *x.shape[1:]).index_copy(0, self.used, x)


@dataclass(frozen=True)
class RouterLosses:
    """The balance loss and the z-loss of a router's micro-batch, without coefficients.

    The balance loss is the sum over experts of f * P: P, with gradient, is the expert's mean share of a token's scores;
    f, without, is its share of the chosen slots, times E. Even load gives 1. `balance` says whose slots these are:

        "sequence": a sequence's own, and the loss is the mean over sequences. No split of a batch cuts a sequence, so
            the loss is the same for every number of ranks and micro-batches.
        "global_batch": those of all ranks and micro-batches, as the running mean over the steps before (the router's
            `running_load`; with a decay of 0, the step before alone). Each rank has that mean already, so there is no
            further collective, and the loss is the same for every split. The step's own slots cannot be had: the first
            micro-batch runs backward before the last one is routed.
        "micro_batch": those of this rank's micro-batch, as Switch Transformer and Mixtral take them. For comparison:
            the loss depends on the split.
    """

    balance: BalanceLoss | None = None  # None: it is 0
    z: bool = False  # False: it is 0

    def __call__(
        self,
        logits: Tensor,
        log_scores: Tensor,
        expert_ids: Tensor,
        running_load: Tensor,
        num_sequences: int,
        padding: Padding | None = None,
    ) -> Tensor:
        """(2,), balance loss and z-loss, in the dtype of the logits; 0 without tokens.

        Args:
            logits: (T, E).
            log_scores: (T, E), logarithms of the scores; P is of their softmax, which is the scores over their sum.
            expert_ids: (T, K), the choices.
            running_load: (E,), sums to 1.
            num_sequences: B, equally long, one after the other.
        """
        balance = z = logits.new_zeros(())
        tokens = padding.positions if padding else max(len(logits), 1)
        if self.balance == "global_batch":
            shares = log_scores.softmax(-1).sum(0)
            balance = (shares * running_load).sum() * (len(running_load) / tokens)
        elif self.balance:
            balance = balance_loss(log_scores, expert_ids, num_sequences if self.balance == "sequence" else 1, padding)
        if self.z:
            z = logits.logsumexp(-1).square().sum() / tokens
        return torch.stack((balance, z))


def balance_loss(log_scores: Tensor, expert_ids: Tensor, num_sequences: int, padding: Padding | None) -> Tensor:
    """By the slots of each sequence, (); arguments as of `RouterLosses`."""
    scores, slots = log_scores.softmax(-1), log_scores.new_ones(()).expand(expert_ids.shape)
    if padding:
        scores, expert_ids, slots = (padding.with_zeros(one) for one in (scores, expert_ids, slots))
    tokens, experts = scores.shape
    ids = expert_ids.view(num_sequences, tokens // num_sequences * expert_ids.shape[1])  # (B, S * K)
    shares = scores.view(num_sequences, tokens // num_sequences, experts).sum(1)  # (B, E)
    counts = torch.zeros_like(shares, requires_grad=False).scatter_add_(1, ids, slots.view(ids.shape))
    if padding:  # a sequence's own tokens are fewer
        shares = shares / slots.view(ids.shape).mean(1, keepdim=True).clamp_min(1 / tokens)
    # f is E / (S * K) of the counts, P is 1 / S of the shares; the mean over sequences is 1 / B.
    return (counts * shares).sum() * (experts / max(tokens * ids.shape[1], 1))
