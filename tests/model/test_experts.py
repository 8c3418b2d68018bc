import pytest
import torch
from devices import DEVICES
from torch import nn
from transformers.activations import ACT2FN

from megamoe.model.experts import ACTIVATIONS, StackedExperts

D, F, E = 8, 12, 3
SIZES = [5, 0, 4]
ENDS = torch.tensor(SIZES).cumsum(0, dtype=torch.int32)


def experts_of(**options):
    torch.manual_seed(0)
    experts = StackedExperts(num_experts=E, hidden_size=D, expert_size=F, **options)
    for weight in experts.parameters():
        nn.init.normal_(weight)
    return experts


@pytest.mark.parametrize("gated", [False, True])
def test_each_row_goes_through_its_own_expert_with_the_activation_of_transformers(gated):
    for name in ACTIVATIONS:
        experts, activation = experts_of(hidden_act=name, gated_mlp=gated).double(), ACT2FN[name]
        rows = torch.randn(sum(SIZES), D, dtype=torch.float64)
        for row, out, expert in zip(rows, experts(rows, ENDS), [0] * 5 + [2] * 4, strict=True):
            if gated:
                gate, up = experts.gate_up[expert, :F], experts.gate_up[expert, F:]
                inside = activation(gate @ row) * (up @ row)
            else:
                inside = activation(experts.up[expert] @ row)
            torch.testing.assert_close(out, experts.down[expert] @ inside, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_on_the_experts_output_in_training_only(device):
    experts = experts_of(expert_dropout=0.5).to(device)
    rows, ends = torch.randn(200, D, device=device), torch.tensor([100, 150, 200], dtype=torch.int32, device=device)
    torch.manual_seed(0)
    dropped = experts(rows, ends)
    experts.eval()
    whole = experts(rows, ends)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
