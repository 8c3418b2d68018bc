"""The router's losses and their gradients against float64 references; which of them depend on a split."""

import itertools

import pytest
import torch

from megamoe.model.router import Router
from megamoe.model.router_losses import RouterLosses

SCORES = ["softmax", "sigmoid"]
BALANCES = ["sequence", "global_batch", "micro_batch"]
B, S, D, E, K = 3, 8, 6, 5, 2
LOADS = [0.1, 0.3, 0.25, 0.15, 0.2]


def router_with(balance=None, z=False, score="softmax", **options):
    torch.manual_seed(0)
    router = Router(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=K, router_score=score,
        losses=RouterLosses(balance, z), **options,
    ).double()  # fmt: skip
    torch.nn.init.normal_(router.weight)
    router.selection_bias.copy_(torch.tensor([0.2, -0.1, 0.1, 0.0, -0.2]))
    router.running_load.copy_(torch.tensor(LOADS, dtype=torch.float64))
    return router


def tokens(sequences=B):
    return torch.randn(sequences * S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


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


def plain_z(logits):
    return sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / len(logits)


def gradients(loss, x, router):
    return torch.autograd.grad(loss, (x, router.weight))


@pytest.mark.parametrize(
    ("balance", "z", "score"),
    [
        ("sequence", True, "softmax"), ("sequence", False, "sigmoid"), ("global_batch", False, "softmax"),
        ("global_batch", True, "sigmoid"), ("micro_batch", True, "softmax"), ("micro_batch", False, "sigmoid"),
        (None, True, "softmax"), (None, True, "sigmoid"), (None, False, "softmax"),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_the_definitions(balance, z, score):
    router, x = router_with(balance, z, score), tokens().requires_grad_()
    routing = router(x, num_sequences=B)
    logits = x @ router.weight.T
    expected = torch.zeros(2, dtype=torch.float64) + 0 * logits.sum()
    if balance == "sequence":
        parts = zip(logits.split(S), routing.expert_ids.split(S), strict=True)
        expected[0] = sum(plain_balance(row, ids, None, score) for row, ids in parts) / B
    elif balance:
        loads = LOADS if balance == "global_batch" else None
        expected[0] = plain_balance(logits, routing.expert_ids, loads, score)
    if z:
        expected[1] = plain_z(logits)
    assert routing.losses.shape == (2,)
    coefficients = torch.tensor([2.0, 3.0], dtype=torch.float64)
    if balance or z:
        found = gradients((routing.losses * coefficients).sum(), x, router)
        exact = gradients((expected * coefficients).sum(), x, router)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
        assert found[1].abs().max() > 1e-3
    torch.testing.assert_close(routing.losses, expected, rtol=0, atol=1e-12)


def test_even_scores_and_loads_give_1():
    for balance, score in itertools.product(BALANCES, SCORES):
        router = router_with(balance, score=score)
        router.weight.data.zero_()
        router.running_load.fill_(1 / E)
        assert router(tokens(), num_sequences=B).losses[0].item() == pytest.approx(1), (balance, score)


def test_only_the_loss_by_micro_batch_depends_on_the_split():
    for balance, parts in itertools.product(BALANCES, (2, 4)):
        router, x = router_with(balance, z=True), tokens(4)
        whole = router(x, num_sequences=4).losses
        split = torch.stack([router(part, num_sequences=4 // parts).losses for part in x.chunk(parts)]).mean(0)
        torch.testing.assert_close(split[1], whole[1], rtol=1e-12, atol=0)
        assert torch.allclose(split[0], whole[0], rtol=1e-12, atol=0) == (balance != "micro_batch"), balance


@pytest.mark.parametrize("balance", BALANCES)
def test_descent_along_the_balance_loss_evens_out_the_load(balance):
    router, x = router_with(balance), tokens()
    x[:, 0] = 1
    with torch.no_grad():
        router.weight[0, 0] = 4  # nearly every token goes to expert 0
    counts = []
    for _ in range(50):
        routing = router(x, num_sequences=B)
        counts.append(routing.counts)
        (grad,) = torch.autograd.grad(routing.losses[0], router.weight)
        router.running_load.copy_(routing.counts / routing.counts.sum())
        router.weight.data -= grad
    assert counts[0].max() > 0.9 * B * S
    assert counts[-1].max() < 0.8 * B * S


def test_without_tokens_losses_and_gradients_are_0():
    for balance, score in itertools.product(BALANCES, SCORES):
        router = router_with(balance, z=True, score=score)
        routing = router(torch.zeros(0, D, dtype=torch.float64), num_sequences=1)
        routing.losses.sum().backward()
        assert routing.losses.tolist() == [0, 0], (balance, score)
        assert router.weight.grad.abs().max() == 0, (balance, score)


def test_scores_that_underflow_still_have_shares():
    router = router_with("sequence", score="sigmoid").float()
    router.weight.data = torch.full((E, D), -200.0)
    routing = router(torch.ones(S, D))
    assert routing.losses[0].item() == pytest.approx(1)


def test_losses_are_fp32_where_tokens_are_bf16():
    router = router_with("sequence", z=True).to(torch.bfloat16)
    assert router(tokens().bfloat16(), num_sequences=B).losses.dtype == torch.float32


# A sequence's with sigmoid scores: tests/model/test_compiled.py.
@pytest.mark.parametrize(("balance", "score"), [("global_batch", "softmax"), ("micro_batch", "sigmoid")])
def test_a_compiled_router_has_the_same_losses_without_a_break(balance, score):
    router = router_with(balance, z=True, score=score)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for sequences in (B, 2 * B):
        x = tokens(sequences).requires_grad_()
        found, expected = compiled(x, sequences).losses, router(x, sequences).losses
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients(found.sum(), x, router), gradients(expected.sum(), x, router))
