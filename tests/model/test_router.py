import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from megamoe.model.router import Router
from megamoe.model.router_losses import RouterLosses

SCORES = ["softmax", "sigmoid"]
T, D, E, K = 40, 6, 5, 2


def router_with(bias=None, dim=D, experts=E, top_k=K, **options):
    torch.manual_seed(0)
    router = Router(hidden_size=dim, num_local_experts=experts, num_experts_per_tok=top_k, **options)
    torch.nn.init.normal_(router.weight)
    if bias is not None:
        router.selection_bias.copy_(torch.tensor(bias))
    return router


def plain_scores(logits, score):
    if score == "sigmoid":
        return [1 / (1 + torch.exp(-logit)) for logit in logits]
    powers = [torch.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(
    ("score", "logits", "bias"),
    [("softmax", [120.0, 110.0, 1.0, 0.0], [0.0, 0.0, 2.0, 2.0]), ("sigmoid", [-110.0] * 4, [0.0] * 4)],
)
def test_weights_sum_to_1_where_the_scores_underflow(score, logits, bias):
    router = router_with(bias, dim=1, experts=4, router_score=score)
    router.weight.data = torch.tensor(logits).unsqueeze(1)
    weights, *_ = router(torch.ones(1, 1))
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


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
    weights, *_ = router(x)
    seen = (weights[:, 0] / weights[:, 1]).log().detach()  # the logit of expert 0, that is 1 times the jitter
    assert 0.9 <= seen.min() < 0.905
    assert 1.095 < seen.max() <= 1.1 + 1e-5
    assert seen.mean().item() == pytest.approx(1, abs=0.01)
    router.eval()
    torch.testing.assert_close(router(x)[0], torch.tensor([[1.0, 0.0]]).softmax(-1).expand(2000, 2))


def test_without_jitter_training_and_evaluation_route_alike():
    router = router_with()
    x = torch.randn(T, D)
    trained = router(x)
    router.eval()
    for one, other in zip(trained[:3], router(x)[:3], strict=True):
        assert torch.equal(one, other)


def test_the_bias_is_no_parameter_and_gets_no_gradient():
    router = router_with([0.1, -0.1, 0.0, 0.2, -0.2])
    router(torch.randn(T, D)).weights.square().sum().backward()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.weight.grad.abs().sum() > 0
    assert not router.selection_bias.requires_grad
    assert router.selection_bias.grad is None


def test_bias_and_running_load_are_saved_and_the_counts_of_a_step_are_not():
    assert set(router_with().state_dict()) == {"weight", "selection_bias", "running_load"}
    without = router_with(router_bias=False)
    assert without.selection_bias is None
    assert set(without.state_dict()) == {"weight", "running_load"}


# --- options, against a float64 reference written here and against transformers' routers ----------------------------


def plain_routing(logits, bias, top_k, score, normalizes, scaling, groups, top_groups):
    """Expert ids and weights of one token; groups by the sum of their two best biased scores."""
    scores = plain_scores(logits, score)
    biased = [one.item() + shift for one, shift in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    worth = [sum(sorted(biased[group * size : (group + 1) * size])[-2:]) for group in range(groups)]
    open_groups = sorted(range(groups), key=lambda group: -worth[group])[:top_groups]
    allowed = [expert for expert in range(len(scores)) if expert // size in open_groups]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:top_k]
    total = sum(scores[expert] for expert in chosen) if normalizes else 1
    return chosen, torch.stack([scores[expert] / total * scaling for expert in chosen])


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
    options = top_k, score, normalizes, scaling, groups, top_groups
    rows = [plain_routing(weight @ token, bias, *options) for token in plain_x]
    weights = torch.stack([row for _, row in rows])
    expected = torch.autograd.grad((weights * coefficients).sum(), (plain_x, weight))
    assert routing.expert_ids.tolist() == [chosen for chosen, _ in rows]
    torch.testing.assert_close((routing.weights, *grads), (weights, *expected), rtol=0, atol=1e-10)
    assert routing.counts.tolist() == [(routing.expert_ids == expert).sum() for expert in range(8)]
    assert routing.losses is None


def test_groups_and_bias_change_what_is_chosen():
    x = torch.randn(T, D)
    bias = [0.3, -0.2, 0.1, 0.0, 0.25, -0.3, 0.2, -0.1]
    options = [{}, {"bias": bias}, {"n_group": 4, "topk_group": 2}, {"n_group": 4, "topk_group": 1}]
    chosen = [
        router_with(experts=8, router_score="sigmoid", **one)(x).expert_ids.sort(-1).values.tolist() for one in options
    ]
    assert all(one != other for one, other in itertools.combinations(chosen, 2))


# transformers' routers: module, class, the options they stand for.
DEEPSEEK = {"router_score": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
TRANSFORMERS = {
    "deepseek_v3.DeepseekV3TopkRouter": DEEPSEEK,
    "deepseek_v3.DeepseekV3TopkRouter, not normalised": {**DEEPSEEK, "norm_topk_prob": False},
    "glm4_moe.Glm4MoeTopkRouter": {**DEEPSEEK, "n_group": 2, "topk_group": 1},
    "minimax_m2.MiniMaxM2TopKRouter": {"router_score": "sigmoid"},
    "olmoe.OlmoeTopKRouter": {"norm_topk_prob": False, "router_bias": False},
    "qwen3_moe.Qwen3MoeTopKRouter": {"router_bias": False},
    "qwen3_moe.Qwen3MoeTopKRouter, not normalised": {"norm_topk_prob": False, "router_bias": False},
    "mixtral.MixtralTopKRouter": {"router_bias": False},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_routing_is_that_of_transformers(name):
    options = TRANSFORMERS[name]
    bias = None if options.get("router_bias") is False else [0.3, -0.2, 0.1, 0.0, 0.25, -0.3, 0.2, -0.1]
    router = router_with(bias, experts=8, top_k=3, **options)
    module, _, kind = name.partition(",")[0].partition(".")
    config = SimpleNamespace(
        num_experts_per_tok=3, num_local_experts=8, num_experts=8, hidden_size=D, n_group=router.num_groups,
        norm_topk_prob=router.normalizes, routed_scaling_factor=router.scaling, topk_group=router.top_groups,
    )  # fmt: skip
    theirs = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), kind)(config)
    theirs.weight.data = router.weight.data
    x, given = torch.randn(T, D), ()
    if hasattr(theirs, "e_score_correction_bias"):
        theirs.e_score_correction_bias.copy_(router.selection_bias)
    elif bias:
        given = (router.selection_bias,)
    _, expected, expert_ids = theirs(x, *given)
    routing = router(x)
    ours, order = routing.expert_ids.sort(-1)
    other, their_order = expert_ids.sort(-1)
    assert torch.equal(ours, other)
    torch.testing.assert_close(routing.weights.gather(-1, order), expected.gather(-1, their_order))


def test_losses_are_computed_in_training_only():
    router = router_with(losses=RouterLosses(balance="sequence", z=True))
    x = torch.randn(T, D)
    assert router(x).losses.shape == (2,)
    assert router.eval()(x).losses is None
