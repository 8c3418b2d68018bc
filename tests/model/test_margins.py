import torch

from megamoe.model.margins import BINS, bin_edges, margin_histogram, needed_shifts

T, E, K = 4000, 8, 2


def scores_of(sharpness, seed=0):
    draw = torch.Generator().manual_seed(seed)
    liked = torch.linspace(-1, 1, E, dtype=torch.float64)
    return (sharpness * (torch.randn(T, E, generator=draw, dtype=torch.float64) + liked)).softmax(-1)


def histogram_of(scores, edges):
    return margin_histogram(scores, scores.topk(K + 1, dim=-1).values, edges)


def test_the_shift_is_the_quantile_of_the_margins_but_for_the_width_of_a_bin():
    for sharpness in (0.1, 1.0, 3.0):
        scores, edges = scores_of(sharpness), bin_edges().double()
        best = scores.topk(K + 1, dim=-1).values
        margins = scores - best[:, K - 1 :].mean(-1, keepdim=True)
        exact = -margins.quantile(1 - K / E, dim=0)
        found = needed_shifts(histogram_of(scores, edges), K / E, edges)
        assert (exact.abs() > 1e-4).any()
        assert ((found / exact).log2().abs() <= 1).all()  # in the same bin, whose edges are a factor of 2 apart


def test_a_shift_is_at_most_one_linear_within_a_bin_and_never_nan():
    edges = bin_edges().double()
    histogram = torch.zeros(2, BINS, 3, dtype=torch.float64)
    histogram[0, 0, 0] = 100  # all margins below -1
    histogram[0, -1, 1] = 100  # all above 1
    histogram[0, -2, 2] = 100  # from 1/2 to 1
    without_tokens = [-1, -1, -1]
    assert needed_shifts(histogram, 0.2, edges).tolist() == [[1, -1, -(1 - 0.2 * 0.5)], without_tokens]
