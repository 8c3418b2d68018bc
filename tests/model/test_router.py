import pytest
import torch

from megamoe.model.router import Router

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


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_selection_takes_the_largest_score_plus_bias_and_weights_take_the_scores_alone(score, top_k):
    bias = [0.0, 0.4, -0.3, 0.2, 0.1]
    router = router_with(bias, top_k=top_k, router_score=score).double()
    x = torch.randn(T, D, dtype=torch.float64)
    weights, expert_ids, _ = router(x)
    differ = 0
    for token in range(T):
        scores = plain_scores(router.weight @ x[token], score)
        biased = sorted(range(E), key=lambda expert: -(scores[expert] + router.selection_bias[expert]))
        unbiased = sorted(range(E), key=lambda expert: -scores[expert])
        differ += set(biased[:top_k]) != set(unbiased[:top_k])
        assert expert_ids[token].tolist() == biased[:top_k]
        total = sum(scores[expert] for expert in biased[:top_k])
        expected = torch.stack([scores[expert] / total for expert in biased[:top_k]])
        torch.testing.assert_close(weights[token], expected, rtol=0, atol=1e-12)
    assert differ > 5 or top_k == E  # the bias does something here


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_weights_sum_to_1(score, top_k):
    weights, *_ = router_with(top_k=top_k, router_score=score)(torch.randn(T, D))
    torch.testing.assert_close(weights.sum(-1), torch.ones(T))


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
    weights, expert_ids, _ = router(x)
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
    for one, other in zip(trained, router(x), strict=True):
        assert torch.equal(one, other)


def test_the_counts_are_those_of_the_chosen_experts():
    _, expert_ids, counts = router_with()(torch.randn(T, D))
    assert counts.tolist() == [(expert_ids == expert).sum() for expert in range(E)]


@pytest.mark.parametrize("score", SCORES)
def test_the_bias_is_no_parameter_and_gets_no_gradient(score):
    router = router_with([0.1, -0.1, 0.0, 0.2, -0.2], router_score=score)
    weights, *_ = router(torch.randn(T, D))
    weights.square().sum().backward()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.weight.grad.abs().sum() > 0
    assert not router.selection_bias.requires_grad
    assert router.selection_bias.grad is None


def test_bias_and_running_load_are_saved_and_the_counts_of_a_step_are_not():
    assert set(router_with().state_dict()) == {"weight", "selection_bias", "running_load"}
