import pytest
import torch

from megamoe.model.dropout import Dropout


@pytest.mark.parametrize(("p", "dtype"), [(0.05, torch.bfloat16), (0.5, torch.float32), (0.93, torch.float32)])
def test_dropout_drops_the_share_it_says_evenly_over_places_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(4000, 101, dtype=dtype)  # 101: rows do not begin at a new draw
    out = Dropout(p)(x)
    dropped = (out == 0).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * spread / dropped.numel() ** 0.5
    for share in (dropped.mean(0), dropped.mean(1)):
        deviation = (share - p) / spread * (dropped.numel() / len(share)) ** 0.5
        assert deviation.abs().max() < 5
        assert deviation.std() == pytest.approx(1, abs=0.2)
    expected = torch.nn.functional.dropout(x, p)
    assert out.unique().tolist() == expected.unique().tolist()


def test_neighbours_of_one_draw_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (Dropout(0.3)(torch.ones(100_000, 4)) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 100_000**0.5


def test_the_gradient_of_dropout_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(50, 8, requires_grad=True)
    out = Dropout(0.4)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x, out)
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    layer, x = Dropout(0.5), torch.ones(3, 7)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(layer.eval()(x), x)
    assert layer.train()(x[:0]).shape == (0, 7)
