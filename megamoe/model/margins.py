"""How far each expert is from being chosen, and the shift of its bias that would give it its share of the tokens.

The margin of an expert for a token is its score + bias less the middle between those of the last chosen expert and the
first rejected one: above 0 it is chosen. Over the tokens of a step, the shift that an expert needs is a quantile of its
margins. They are counted in bins, whose sums are exact: the shift is the same on any number of ranks.

Sources: Sun, "Binary-Integer-Programming Based Algorithm for Expert Load Balancing in Mixture-of-Experts Models"
(arXiv:2502.15451), which takes the quantile within a batch, before it is routed; here it moves the bias of the next.

Shape legend: T tokens, E experts, N bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = -15  # power of 4
BINS = 2 * (1 - SMALLEST) + 2


def bin_edges() -> Tensor:
    """The edges between the bins, (N - 1,): 0 and powers of 4, for sharp routers have margins of all sizes."""
    positive = torch.exp2(2 * torch.arange(float(SMALLEST), 1.0))
    return torch.cat((-positive.flip(0), torch.zeros(1), positive))


def margin_bins(scores: Tensor, best: Tensor, edges: Tensor) -> Tensor:
    """The bin (T, E) int64 of each margin.

    Args:
        scores: with their bias, (T, E).
        best: the largest of each token in descending order, one more than are chosen, (T, K + 1).
        edges: `bin_edges`.
    """
    middle = best[:, -2:].mean(-1, keepdim=True)
    return torch.bucketize(scores - middle, edges.to(scores.dtype))


def needed_shifts(histogram: Tensor, share: float, edges: Tensor) -> Tensor:
    """The shift (..., E) of each expert's bias with which it would have been chosen by `share` of the tokens, the other
    experts' biases as they are. From -1 to 1; linear within a bin.

    Args:
        histogram: tokens in each bin, (..., N, E) fp64.
        edges: `bin_edges`.
    """
    low, high = torch.cat((edges[:1], edges)), torch.cat((edges, edges[-1:]))  # of a bin
    wanted = share * histogram.sum(-2, keepdim=True)
    at_least = histogram.flip(-2).cumsum(-2).flip(-2)  # tokens in a bin and above
    bin_of = (at_least >= wanted).sum(-2, keepdim=True) - 1
    inside = histogram.gather(-2, bin_of)
    above = at_least.gather(-2, bin_of) - inside
    part = (wanted - above) / inside.clamp_min(1)
    return ((high - low)[bin_of] * part - high[bin_of]).squeeze(-2)
