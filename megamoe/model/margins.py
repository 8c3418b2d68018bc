"""How far each expert is from being chosen, and the shift of its bias that would give it its share of the tokens.

The margin of an expert for a token is its score + bias less the middle between those of the last chosen expert and the
first rejected one: above 0 it is chosen. Over the tokens of a step, the shift that an expert needs is minus a quantile
of its margins. They are counted in bins, whose sums are exact: the shift is the same on any number of ranks.

Sources: Sun, "Binary-Integer-Programming Based Algorithm for Expert Load Balancing in Mixture-of-Experts Models"
(arXiv:2502.15451), which takes the quantile within a batch, before it is routed; here it moves the bias of the next.

Shape legend: T tokens, E experts, N bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = -24  # power of 2
BINS = 2 * (1 - SMALLEST) + 2


def bin_edges() -> Tensor:
    """The edges between the bins, (N - 1,): 0 and powers of 2, for margins have all sizes. Within bins a factor of 2
    apart a shift always brings a margin closer to 0."""
    positive = torch.exp2(torch.arange(float(SMALLEST), 1.0))
    return torch.cat((-positive.flip(0), torch.zeros(1), positive))


def margin_histogram(scores: Tensor, best: Tensor, edges: Tensor) -> Tensor:
    """How many tokens have the margin of each expert in each bin, (N, E) int64.

    Args:
        scores: with their bias, (T, E).
        best: the largest of each token in descending order, one more than are chosen, (T, K + 1).
        edges: `bin_edges`.
    """
    middle = best[:, -2:].mean(-1, keepdim=True)
    bins = torch.bucketize(scores - middle, edges.to(scores.dtype))
    ones = bins.new_ones(()).expand_as(bins)
    return bins.new_zeros(BINS, bins.shape[1]).scatter_add_(0, bins, ones)


def needed_shifts(histogram: Tensor, share: float, edges: Tensor) -> Tensor:
    """The shift (..., E) of each expert's bias that puts its margin above 0 for `share` of the tokens. From -1 to 1;
    linear within a bin. Half of each gap between experts is left to the others, which move too.

    Args:
        histogram: tokens in each bin, (..., N, E), integers of any dtype.
        edges: `bin_edges`.
    """
    histogram = histogram.long()  # a floating cumsum is not deterministic on GPUs
    low, high = torch.cat((edges[:1], edges)), torch.cat((edges, edges[-1:]))  # of a bin
    wanted = share * histogram.sum(-2, keepdim=True).double()
    at_least = histogram.flip(-2).cumsum(-2).flip(-2)  # tokens in a bin and above
    bin_of = (at_least >= wanted).sum(-2, keepdim=True) - 1
    inside = histogram.gather(-2, bin_of)
    above = at_least.gather(-2, bin_of) - inside
    part = (wanted - above) / inside.clamp_min(1)
    return ((high - low)[bin_of] * part - high[bin_of]).squeeze(-2)
