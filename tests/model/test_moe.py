import copy
import math

import deepspeed.moe.layer
import pytest
import torch
from devices import DEVICES, assert_near, rounded
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamoe.model import dispatch
from megamoe.model.experts import StackedExperts
from megamoe.model.moe import MoE
from megamoe.model.router import Router
from megamoe.model.router_losses import RouterLosses
from megamoe.model.topology import ExpertTopology

D, F, E, T = 8, 16, 4, 9


def layer_of(top_k, gated=False, topology=None, **changes):
    topology = topology or ExpertTopology(E)
    parts = {
        "router": Router(hidden_size=D, num_local_experts=E, num_experts_per_tok=top_k),
        "experts": StackedExperts(num_experts=topology.experts_per_rank, hidden_size=D, expert_size=F, gated_mlp=gated),
        "topology": topology,
    }
    return MoE(**{**parts, **changes}, hidden_size=D)


# --- the layer, against a plain sum over the chosen experts of each token -------------------------------------------


def layer_with(bias=(0.0,) * E, top_k=2, gated=False):
    torch.manual_seed(0)
    layer = layer_of(top_k, gated).double()
    for weight in layer.parameters():
        nn.init.normal_(weight, 0, 0.5)
    layer.router.selection_bias.copy_(torch.tensor(bias))
    return layer


def silu(x):
    return x / (1 + torch.exp(-x))


def plain_layer(x, router_weight, experts, bias, top_k):
    """What the layer is defined to be, token by token, and the slots of each expert; `experts` are (up, down) pairs, or
    (gate and up, down) with twice the rows."""
    outputs, slots = [], [0] * len(experts)
    for token in x:
        powers = [torch.exp(row @ token) for row in router_weight]
        scores = [power / sum(powers) for power in powers]
        ranked = sorted(range(len(experts)), key=lambda expert: scores[expert].item() + bias[expert], reverse=True)
        chosen = ranked[:top_k]
        total = sum(scores[expert] for expert in chosen)
        output = torch.zeros_like(token)
        for expert in chosen:
            up, down = experts[expert]
            inside = silu(up[:F] @ token) * (up[F:] @ token) if len(up) == 2 * F else silu(up @ token)
            output = output + scores[expert] / total * (down @ inside)
            slots[expert] += 1
        outputs.append(output)
    return torch.stack(outputs), slots


def stacks_of(layer):
    first, down = layer.experts.parameters()
    return first, down


def copies_of(layer):
    def copy(weight):
        return weight.detach().clone().requires_grad_()

    return copy(layer.router.weight), [(copy(up), copy(down)) for up, down in zip(*stacks_of(layer), strict=True)]


ROUTINGS = {
    "random": (0.0, 0.0, 0.0, 0.0),
    "one expert gets nothing": (0.0, -9.0, 0.0, 0.0),
    "all tokens to the same experts": (0.0, 8.0, 0.0, 9.0),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("top_k", "tokens", "multiple", "gated"),  # any two values of two of them
    [(1, T, 1, True), (1, 1, 64, False), (2, T, 64, True), (2, 1, 1, False), (E, T, 1, False), (E, 1, 64, True)],
)
def test_the_layer_is_the_sum_over_chosen_experts_and_so_are_its_gradients(
    routing, top_k, tokens, multiple, gated, monkeypatch
):
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", multiple)
    layer = layer_with(ROUTINGS[routing], top_k, gated)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(tokens, D, dtype=torch.float64)
    output, _, counts = layer(x)
    (output * coefficients).sum().backward()

    plain_x = x.detach().clone().requires_grad_()
    router_weight, experts = copies_of(layer)
    expected, slots = plain_layer(plain_x, router_weight, experts, ROUTINGS[routing], top_k)
    (expected * coefficients).sum().backward()

    def same(one, other):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

    same(output, expected)
    same(x.grad, plain_x.grad)
    same(layer.router.weight.grad, router_weight.grad)
    for stack, plain in zip(stacks_of(layer), zip(*experts, strict=True), strict=True):
        # An expert that no token chose has no part in the plain sum; in the layer it has gradients all the same.
        same(stack.grad, torch.stack([torch.zeros_like(one) if one.grad is None else one.grad for one in plain]))
    assert counts.tolist() == slots
    if routing == "one expert gets nothing" and top_k < E:
        assert slots[1] == 0
    if routing == "all tokens to the same experts":
        assert slots[3] == tokens
        assert sum(slot > 0 for slot in slots) == top_k


@pytest.mark.parametrize(
    ("routing", "gated"),
    list(zip(ROUTINGS, (False, True, True), strict=True)),
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_layer_and_its_gradients_in_fp32_and_bf16_are_those_in_float64(device, dtype, routing, gated):
    exact = rounded(layer_with(ROUTINGS[routing], gated=gated), dtype)
    layer = copy.deepcopy(exact).to(device, dtype)
    x, grad = torch.randn(2, 1000, D).to(dtype).double().unbind()
    x.requires_grad_()
    expected, _, slots = exact(x)
    expected.backward(grad)

    low = x.detach().to(device, dtype).requires_grad_()
    output, _, counts = layer(low)
    output.backward(grad.to(device, dtype))
    assert torch.equal(counts.cpu(), slots)
    assert_near(output, expected, dtype, "output")
    assert_near(low.grad, x.grad, dtype, "gradient of the input")
    for (name, found), one in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert_near(found.grad, one.grad, dtype, name)


class Same(nn.Module):
    """Experts that change nothing."""

    def forward(self, rows, ends):
        return rows


@pytest.mark.parametrize(("routing", "top_k"), zip(ROUTINGS, (2, E, 1), strict=True))
def test_no_token_is_dropped(routing, top_k):
    torch.manual_seed(0)
    router = Router(hidden_size=D, num_local_experts=E, num_experts_per_tok=top_k)
    nn.init.normal_(router.weight)
    router.selection_bias.copy_(torch.tensor(ROUTINGS[routing]))
    layer = layer_of(top_k, experts=Same(), router=router)  # a slot that went missing would be missing in the sum
    x = torch.randn(500, D)
    output, _, counts = layer(x)
    torch.testing.assert_close(output, x)
    assert counts.sum() == 500 * top_k
    assert torch.equal(counts, router.step_counts)


def test_the_output_has_the_shape_of_the_input_and_each_token_its_own_result():
    layer = layer_with()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    output, _, _ = layer(x)
    assert output.shape == x.shape
    for row in range(2):
        for position in range(3):
            alone, _, _ = layer(x[row : row + 1, position])
            torch.testing.assert_close(output[row, position], alone[0], rtol=0, atol=1e-12)


def test_the_losses_of_the_router_come_with_the_output_where_it_has_any():
    assert layer_with()(torch.randn(T, D, dtype=torch.float64))[1] is None
    torch.manual_seed(0)
    router = Router(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=2, losses=RouterLosses(balance="sequence", z=True)
    )
    nn.init.normal_(router.weight)
    layer = layer_of(2, router=router).double()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    losses = layer(x)[1]
    assert torch.equal(losses, router(x.flatten(0, 1), num_sequences=2).losses)
    assert not torch.equal(losses, layer(x.flatten(0, 1))[1])  # one sequence of six tokens
    used = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(layer(x, used)[1], router(x[used]).losses)
    assert layer(x, torch.zeros(2, 3, dtype=torch.bool))[1].tolist() == [0, 0]


def test_unused_tokens_reach_no_expert_and_give_0():
    layer = layer_with()
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    used = torch.tensor([[True, False, True, True], [False, False, True, False]])
    output, _, counts = layer(x, used)
    output.square().sum().backward()
    alone, _, alone_counts = layer(x[used])
    torch.testing.assert_close(output[used], alone, rtol=0, atol=1e-12)
    assert output[~used].abs().max() == 0
    assert x.grad[~used].abs().max() == 0
    assert x.grad[used].abs().min() > 0
    assert torch.equal(counts, alone_counts)
    assert counts.sum() == 4 * 2


def test_a_share_without_any_used_token_still_has_zero_gradients():
    layer = layer_with()
    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    output, _, counts = layer(x, torch.zeros(1, 3, dtype=torch.bool))
    output.sum().backward()
    assert output.abs().max() == 0
    assert counts.tolist() == [0] * E
    assert all(weight.grad is not None and weight.grad.abs().max() == 0 for weight in layer.parameters())


# --- the slots counted for the balancer -----------------------------------------------------------------------------


def test_counts_add_up_over_training_passes_and_evaluation_counts_nothing():
    layer = layer_with()
    expected = torch.zeros(E, dtype=torch.int64)
    for _ in range(3):
        expected += layer(torch.randn(T, D, dtype=torch.float64))[2]
    layer.eval()
    layer(torch.randn(T, D, dtype=torch.float64))
    assert torch.equal(layer.router.step_counts, expected)
    assert expected.sum() == 3 * T * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_pass_is_not_counted_again(use_reentrant):
    layer = layer_with()
    runs = []
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    for passes in (1, 2):
        x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
        checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant).square().sum().backward()
        assert len(runs) == 2 * passes  # it did run again
        assert layer.router.step_counts.sum() == passes * T * 2
        entropies = entropies_of(layer.router(x).log_scores.exp())
        assert layer.deepspeed_moe.step_entropy.item() == pytest.approx(entropies.sum().item(), rel=1e-9)
        layer.deepspeed_moe.step_entropy.zero_()


def entropies_of(scores):
    """Of each token, in the form of the definition."""
    shares = (scores / scores.sum(-1, keepdim=True)).detach().double()
    return -(shares * shares.log()).sum(-1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_entropy_of_a_step_is_that_of_the_scores_of_all_its_tokens_in_training(score):
    torch.manual_seed(0)
    router = Router(hidden_size=D, num_local_experts=E, num_experts_per_tok=2, router_score=score)
    nn.init.normal_(router.weight)
    layer, expected = layer_of(2, experts=Same(), router=router), 0.0
    for tokens in (5, T):
        x = torch.randn(tokens, D)
        logits = x.double() @ router.weight.double().T
        expected += entropies_of(logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)).sum().item()
        layer(x)
    layer.eval()
    layer(torch.randn(T, D))
    assert layer.deepspeed_moe.step_entropy.item() == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < (5 + T) * math.log(E)


# --- as DeepSpeed's -------------------------------------------------------------------------------------------------


def test_deepspeed_takes_the_layer_for_its_own():
    layer = layer_with()
    assert isinstance(layer, deepspeed.moe.layer.MoE)
    assert layer.num_local_experts == E
    for name, weight in layer.named_parameters():
        is_expert = "router" not in name
        assert getattr(weight, "allreduce", True) != is_expert  # how its engine tells expert parameters from others
        assert not is_expert or weight.group_name == "ep_size_1"


def test_an_exchange_that_moves_nothing_has_the_shapes_of_a_real_one(monkeypatch):
    layer = layer_of(2, topology=ExpertTopology(E, ep_size=2, world_size=2)).double()
    for weight in layer.parameters():
        nn.init.normal_(weight)
    seen = []
    monkeypatch.setattr(dispatch.dist, "all_to_all_single", lambda out, rows, *splits, group: seen.append(splits))
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written
    try:
        out = layer(torch.randn(T, D, dtype=torch.float64))[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.shape == (T, D)
    counts, there, back = seen
    assert counts == ()
    assert there == back == (there[0], there[0])  # what is sent to a peer is what it seems to send
    assert sum(there[0]) == 2 * T
