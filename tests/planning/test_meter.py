import torch

from megamoe.planning.meter import LiveBytes


def test_a_storage_counts_once_and_until_it_is_freed():
    with LiveBytes() as live:
        base = torch.zeros(1000)
        view = base.view(10, 100)[3]
        assert live.now == 4000
        del base
        assert live.now == 4000  # the view still has all of it
        del view
        assert live.now == 0
        assert live.peak == 4000


def test_what_autograd_keeps_is_live_until_backward_has_passed():
    with LiveBytes() as live:
        weight = torch.zeros(64, 64, requires_grad=True)
        out = (torch.ones(32, 64) @ weight).sigmoid().sum()  # keeps the rows and the sigmoid
        assert live.now == 4 * (64 * 64 + 2 * 32 * 64 + 1)
        out.backward()
        # At most at once: the weight, its gradient, the rows, the gradient behind the sigmoid.
        assert live.peak >= 4 * (2 * 64 * 64 + 2 * 32 * 64)
        assert live.now == 4 * (2 * 64 * 64 + 1)
