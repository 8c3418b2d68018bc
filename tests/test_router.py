import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megamoe.router import LoadBalancer, Router, max_violation

SCORES = ["softmax", "sigmoid"]
T, D, E, K = 40, 6, 5, 2


def router_with(bias=None, dim=D, experts=E, top_k=K, **options):
    torch.manual_seed(0)
    router = Router(dim, experts, top_k, **options)
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
    router = router_with(bias, top_k=top_k, score=score).double()
    x = torch.randn(T, D, dtype=torch.float64)
    weights, expert_ids = router(x)
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
    weights, _ = router_with(top_k=top_k, score=score)(torch.randn(T, D))
    torch.testing.assert_close(weights.sum(-1), torch.ones(T))


@pytest.mark.parametrize(
    ("score", "logits", "bias"),
    [("softmax", [120.0, 110.0, 1.0, 0.0], [0.0, 0.0, 2.0, 2.0]), ("sigmoid", [-110.0] * 4, [0.0] * 4)],
)
def test_weights_sum_to_1_where_the_scores_underflow(score, logits, bias):
    router = router_with(bias, dim=1, experts=4, score=score)
    router.weight.data = torch.tensor(logits).unsqueeze(1)
    weights, _ = router(torch.ones(1, 1))
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("score", SCORES)
def test_logits_are_fp32_where_tokens_and_weight_are_bf16(score):
    router = router_with(dim=64, score=score, top_k=E).bfloat16()
    x = torch.randn(T, 64).bfloat16()
    weights, expert_ids = router(x)
    assert weights.dtype == torch.float32
    logits = x.double() @ router.weight.double().T
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    expected = (scores / scores.sum(-1, keepdim=True)).gather(-1, expert_ids)
    torch.testing.assert_close(weights, expected.float(), rtol=1e-4, atol=1e-6)


def test_jitter_scales_the_input_within_its_bounds_in_training_only():
    router = router_with(dim=1, experts=2, jitter_noise=0.1)
    router.weight.data = torch.tensor([[1.0], [0.0]])
    x = torch.ones(2000, 1)
    weights, _ = router(x)
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


def test_counts_add_up_over_training_passes():
    router = router_with()
    expected = torch.zeros(E, dtype=torch.int64)
    for _ in range(3):
        _, expert_ids = router(torch.randn(T, D))
        for expert in expert_ids.flatten().tolist():
            expected[expert] += 1
    assert torch.equal(router.step_counts, expected)
    assert router.step_counts.sum() == 3 * T * K


def test_evaluation_counts_nothing():
    router = router_with().eval()
    router(torch.randn(T, D))
    assert router.step_counts.sum() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_pass_is_not_counted_again(use_reentrant):
    router = router_with()
    runs = []
    router.register_forward_pre_hook(lambda *_: runs.append(1))
    for passes in (1, 2):
        x = torch.randn(T, D, requires_grad=True)
        checkpoint(lambda x: router(x)[0], x, use_reentrant=use_reentrant).square().sum().backward()
        assert len(runs) == 2 * passes  # it did run again
        assert router.step_counts.sum() == passes * T * K


@pytest.mark.parametrize("score", SCORES)
def test_the_bias_is_no_parameter_and_gets_no_gradient(score):
    router = router_with([0.1, -0.1, 0.0, 0.2, -0.2], score=score)
    weights, _ = router(torch.randn(T, D))
    weights.square().sum().backward()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.weight.grad.abs().sum() > 0
    assert not router.selection_bias.requires_grad
    assert router.selection_bias.grad is None


def test_bias_and_running_load_are_saved_and_the_counts_of_a_step_are_not():
    assert set(router_with().state_dict()) == {"weight", "selection_bias", "running_load"}


def test_max_violation_by_hand():
    loads = torch.tensor([[4, 0, 0, 0], [2, 2, 2, 2], [3, 1, 2, 2], [0, 0, 1, 7]])
    assert max_violation(loads).tolist() == [3.0, 0.0, 0.5, 2.5]
    assert max_violation(torch.tensor([0.3, 0.2, 0.5])).item() == pytest.approx(0.5)


def routers_that_counted(*counts):
    routers = []
    for count in counts:
        routers.append(router_with(experts=len(count)))
        routers[-1].step_counts += torch.tensor(count)
    return routers


# Shares [.75 .125 .125 0] and [0 .125 .25 .625]; the running mean starts at 1/4 and takes a tenth of them.
COUNTS = [6, 1, 1, 0], [0, 1, 2, 5]
RUNNING = [[0.3, 0.2375, 0.2375, 0.225], [0.225, 0.2375, 0.25, 0.2875]]


def test_a_step_takes_a_tenth_of_the_batch_into_the_running_mean():
    routers = routers_that_counted(*COUNTS)
    balance = LoadBalancer(routers, 0.01, "sign", 0.9).step(True)
    for router, running in zip(routers, RUNNING, strict=True):
        torch.testing.assert_close(router.running_load, torch.tensor(running))
        assert router.step_counts.tolist() == [0, 0, 0, 0]
    assert balance.counts.tolist() == [list(count) for count in COUNTS]
    torch.testing.assert_close(balance.batch_max_vio, torch.tensor([2.0, 1.5]))
    torch.testing.assert_close(balance.running_max_vio, torch.tensor([0.2, 0.15]))


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ("sign", [-1, 1, 1, 1]),
        ("proportional", [-0.2, 0.05, 0.05, 0.1]),  # (1/4 - running) / (1/4)
    ],
)
def test_the_bias_moves_toward_the_underloaded_with_the_mean_taken_out(rule, shares):
    (router,) = routers_that_counted(COUNTS[0])
    LoadBalancer([router], 0.01, rule, 0.9).step(True)
    mean = sum(shares) / 4
    torch.testing.assert_close(router.selection_bias, torch.tensor([0.01 * (share - mean) for share in shares]))
    assert router.selection_bias.sum().item() == pytest.approx(0, abs=1e-8)


def test_the_bias_follows_the_running_load_and_not_the_batch():
    (router,) = routers_that_counted([6, 1, 1, 0])
    balancer = LoadBalancer([router], 0.01, "sign", 0.9)
    balancer.step(True)
    router.step_counts += torch.tensor([1, 2, 2, 3])  # for once expert 0 is given too little
    balancer.step(True)
    # running [.2825 .23875 .23875 .24]: expert 0 is still above 1/4, so both steps moved alike
    torch.testing.assert_close(router.running_load, torch.tensor([0.2825, 0.23875, 0.23875, 0.24]))
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.03, 0.01, 0.01, 0.01]))


def test_each_layer_has_its_own_statistics_and_bias():
    routers = routers_that_counted(*COUNTS)
    LoadBalancer(routers, 0.01, "proportional", 0.9).step(True)
    torch.testing.assert_close(routers[0].selection_bias, torch.tensor([-0.002, 0.0005, 0.0005, 0.001]))
    torch.testing.assert_close(
        routers[1].selection_bias, torch.tensor([0.001, 0.0005, 0.0, -0.0015]), rtol=0, atol=1e-8
    )


def test_a_skipped_step_moves_nothing_and_forgets_its_counts():
    (router,) = routers_that_counted(COUNTS[0])
    balancer = LoadBalancer([router], 0.01, "sign", 0.9)
    assert balancer.step(False) is None
    assert router.selection_bias.tolist() == [0, 0, 0, 0]
    assert router.running_load.tolist() == [0.25] * 4
    assert router.step_counts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("favoured", [1, 2])
@pytest.mark.parametrize(
    ("score", "rule", "rate"),
    [
        ("softmax", "sign", 0.001),
        ("softmax", "proportional", 0.005),
        ("sigmoid", "sign", 0.002),
        ("sigmoid", "proportional", 0.005),
    ],
)
def test_a_badly_skewed_router_comes_into_balance(score, rule, rate, favoured):
    router = router_with(dim=16, experts=8, score=score)
    torch.nn.init.normal_(router.weight, 0, 0.2)
    with torch.no_grad():
        router.weight[:, 0] = 0
        router.weight[:favoured, 0] = 4  # every token has a 1 in dimension 0
    balancer = LoadBalancer([router], rate, rule, 0.9)
    history = []
    for _ in range(700):
        tokens = torch.randn(512, 16)
        tokens[:, 0] = 1
        with torch.no_grad():
            router(tokens)
        history.append(balancer.step(True))
    assert history[0].batch_max_vio > 2.9  # an expert is given nearly every token; all of them would be 8 / 2 - 1 = 3
    assert all(balance.running_max_vio < 0.2 for balance in history[-50:])
