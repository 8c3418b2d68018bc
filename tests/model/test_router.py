"""Choices, weights and losses of a router, with their gradients, against formulas in float64."""

import itertools

import formulas
import pytest
import torch
from devices import close

from megamoe.model.router import Router
from megamoe.model.router_losses import RouterLosses

SCORES = ["softmax", "sigmoid"]
T, D, E, K = 24, 6, 5, 2


def router_with(bias=None, dim=D, experts=E, top_k=K, **options):
    torch.manual_seed(0)
    router = Router(hidden_size=dim, num_local_experts=experts, num_experts_per_tok=top_k, **options)
    torch.nn.init.normal_(router.weight)
    if bias is not None:
        router.selection_bias.copy_(torch.tensor(bias))
    return router


@pytest.mark.parametrize(
    ("score", "top_k", "normalizes", "scaling", "groups", "top_groups", "has_bias"),  # any two values of two of them
    [
        ("softmax", 1, True, 2.5, 1, 1, True),
        ("sigmoid", 8, False, 2.5, 1, 1, False),
        ("softmax", 2, False, 2.5, 4, 2, True),
        ("sigmoid", 1, True, 1.0, 4, 2, False),
        ("sigmoid", 2, True, 2.5, 2, 1, True),
        ("softmax", 1, False, 1.0, 2, 1, False),
        ("softmax", 8, True, 1.0, 4, 4, False),
        ("sigmoid", 2, False, 1.0, 1, 1, False),
        ("sigmoid", 8, False, 1.0, 4, 4, True),
    ],
)
def test_every_option_routes_as_defined_and_so_are_its_gradients(
    score, top_k, normalizes, scaling, groups, top_groups, has_bias
):
    bias = [-1.2, -1.7, -1.4, -1.5, -1.25, -1.8, -1.3, -1.6]  # all sums with scores are below 0
    router = router_with(
        bias if has_bias else None, experts=8, top_k=top_k, router_score=score, norm_topk_prob=normalizes,
        n_group=groups, routed_scaling_factor=scaling, topk_group=top_groups, router_bias=has_bias,
    ).double()  # fmt: skip
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(T, top_k, dtype=torch.float64)
    routing = router(x)
    grads = torch.autograd.grad((routing.weights * coefficients).sum(), (x, router.weight))

    plain_x, weight = x.detach().clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    bias = router.selection_bias.tolist() if has_bias else [0.0] * 8
    options = {"score": score, "normalizes": normalizes, "scaling": scaling, "groups": groups, "top_groups": top_groups}
    rows = [formulas.routing(weight @ token, bias, top_k, **options) for token in plain_x]
    weights = torch.stack([row for _, row in rows])
    expected = torch.autograd.grad((weights * coefficients).sum(), (plain_x, weight))
    assert routing.expert_ids.tolist() == [chosen for chosen, _ in rows]
    close((routing.weights, *grads), (weights, *expected))
    assert routing.counts.tolist() == [(routing.expert_ids == expert).sum() for expert in range(8)]
    assert routing.losses is None


@pytest.mark.parametrize(
    ("score", "logits", "bias"),
    [("softmax", [120.0, 110.0, 1.0, 0.0], [0.0, 0.0, 2.0, 2.0]), ("sigmoid", [-110.0] * 4, [0.0] * 4)],
)
def test_weights_sum_to_1_where_the_scores_underflow(score, logits, bias):
    router = router_with(bias, dim=1, experts=4, router_score=score)
    router.weight.data = torch.tensor(logits).unsqueeze(1)
    close(router(torch.ones(1, 1)).weights.sum(), torch.tensor(1.0), 1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_logits_are_fp32_where_tokens_and_weight_are_bf16(score):
    router = router_with(dim=64, router_score=score, top_k=E).bfloat16()
    x = torch.randn(T, 64).bfloat16()
    weights, expert_ids, *_ = router(x)
    assert weights.dtype == torch.float32
    logits = x.double() @ router.weight.double().T
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    expected = (scores / scores.sum(-1, keepdim=True)).gather(-1, expert_ids)
    torch.testing.assert_close(weights, expected.float(), rtol=1e-4, atol=1e-6)


def test_jitter_scales_the_input_within_its_bounds_in_training_only():
    router = router_with(dim=1, experts=2, router_jitter_noise=0.1)
    router.weight.data = torch.tensor([[1.0], [0.0]])
    x = torch.ones(2000, 1)
    weights = router(x).weights
    seen = (weights[:, 0] / weights[:, 1]).log().detach()  # the logit of expert 0, that is 1 times the jitter
    assert 0.9 <= seen.min() < 0.905
    assert 1.095 < seen.max() <= 1.1 + 1e-5
    assert seen.mean().item() == pytest.approx(1, abs=0.01)
    router.eval()
    close(router(x).weights, torch.tensor([[1.0, 0.0]]).softmax(-1).expand(2000, 2), 1e-6)


def test_bias_and_running_load_are_saved_and_what_a_step_counts_is_not():
    assert set(router_with(counts_margins=True).state_dict()) == {"weight", "selection_bias", "running_load"}
    assert set(router_with(router_bias=False).state_dict()) == {"weight", "running_load"}


# --- losses ---------------------------------------------------------------------------------------------------------

BALANCES = ["sequence", "global_batch", "micro_batch"]
B = 3  # sequences of T / B tokens
LOADS = [0.1, 0.3, 0.25, 0.15, 0.2]


def router_that_loses(balance=None, z=False, score="softmax"):
    bias = [0.2, -0.1, 0.1, 0.0, -0.2]
    router = router_with(bias, router_score=score, losses=RouterLosses(balance, z)).double()
    router.running_load.copy_(torch.tensor(LOADS, dtype=torch.float64))
    return router


def plain_balance(logits, expert_ids, loads, score):
    """Of one sequence, expert by expert; `loads` None takes its own."""
    loss = 0
    for expert in range(E):
        share = 0
        for row in logits:
            scores = 1 / (1 + torch.exp(-row)) if score == "sigmoid" else torch.exp(row)
            share = share + scores[expert] / scores.sum() / len(logits)
        slots = (expert_ids == expert).sum().item()
        loss = loss + share * (E * loads[expert] if loads else E / (K * len(logits)) * slots)
    return loss


@pytest.mark.parametrize(
    ("balance", "z", "score"),
    [
        ("sequence", True, "softmax"), ("sequence", False, "sigmoid"), ("global_batch", False, "softmax"),
        ("global_batch", True, "sigmoid"), ("micro_batch", True, "softmax"), ("micro_batch", False, "sigmoid"),
        (None, True, "softmax"), (None, True, "sigmoid"), (None, False, "softmax"),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_the_definitions_in_training(balance, z, score):
    router, x = router_that_loses(balance, z, score), torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    routing = router(x, num_sequences=B)
    logits = x @ router.weight.T
    expected = torch.zeros(2, dtype=torch.float64) + 0 * logits.sum()
    if balance == "sequence":
        parts = zip(logits.split(T // B), routing.expert_ids.split(T // B), strict=True)
        expected[0] = sum(plain_balance(row, ids, None, score) for row, ids in parts) / B
    elif balance:
        loads = LOADS if balance == "global_batch" else None
        expected[0] = plain_balance(logits, routing.expert_ids, loads, score)
    if z:
        expected[1] = sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / T
    close(routing.losses, expected)
    coefficients = torch.tensor([2.0, 3.0], dtype=torch.float64)
    if balance or z:
        pairs = ((routing.losses * coefficients).sum(), (expected * coefficients).sum())
        found, exact = (torch.autograd.grad(loss, (x, router.weight)) for loss in pairs)
        close(found, exact)
        assert found[1].abs().max() > 1e-3
    assert router.eval()(x).losses is None


def test_without_tokens_losses_and_gradients_are_0():
    for balance, score in itertools.product(BALANCES, SCORES):
        router = router_that_loses(balance, True, score)
        routing = router(torch.zeros(0, D, dtype=torch.float64), num_sequences=1)
        routing.losses.sum().backward()
        assert routing.losses.tolist() == [0, 0], (balance, score)
        assert router.weight.grad.abs().max() == 0, (balance, score)


def test_scores_that_underflow_still_have_shares():
    router = router_that_loses("sequence", score="sigmoid").float()
    router.weight.data = torch.full((E, D), -200.0)
    assert router(torch.ones(T, D)).losses[0].item() == pytest.approx(1)
