import pytest
import torch

from megamoe.model.dropout import Dropout


@pytest.mark.parametrize(("p", "dtype"), [(0.05, torch.bfloat16), (0.5, torch.float32), (0.93, torch.float32)])
def test_dropout_drops_the_share_it_says_evenly_and_independently_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(4000, 101, dtype=dtype)  # 101: rows do not begin at a new draw
    out = Dropout(p)(x)
    dropped = (out == 0).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * spread / dropped.numel() ** 0.5
    for share in (dropped.mean(0), dropped.mean(1)):
        errors = (share - p) / spread * (dropped.numel() / len(share)) ** 0.5
        assert errors.abs().max() < 5
        assert errors.std() == pytest.approx(1, abs=0.2)
    of_draws = torch.corrcoef(dropped.flatten().view(-1, 4).T) - torch.eye(4)
    assert of_draws.abs().max() < 5 / (dropped.numel() / 4) ** 0.5
    expected = torch.nn.functional.dropout(x, p)
    assert out.unique().tolist() == expected.unique().tolist()


def test_dropout_follows_the_seed_its_gradient_passes_where_the_value_did_and_it_is_off_in_evaluation():
    layer, x = Dropout(0.4), torch.randn(50, 7, requires_grad=True)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    (gradient,) = torch.autograd.grad(draws[0].sum(), x)
    torch.testing.assert_close(gradient * x, draws[0])
    assert torch.equal(layer.eval()(x), x)
    assert layer.train()(x[:0]).shape == (0, 7)
