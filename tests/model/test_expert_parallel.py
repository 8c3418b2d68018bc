"""The layer over several ranks against a plain sum in float64."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn.functional import silu

from megamoe.model.experts import StackedExperts
from megamoe.model.moe import MoE
from megamoe.model.router import Router
from megamoe.topology import ExpertTopology

D, F, E, K = 8, 12, 4, 2


def weights(gated):
    draw = torch.Generator().manual_seed(7)
    router = torch.randn(E, D, generator=draw, dtype=torch.float64)
    up = torch.randn(E, 2 * F if gated else F, D, generator=draw, dtype=torch.float64)  # a gate's rows first
    down = torch.randn(E, D, F, generator=draw, dtype=torch.float64)
    return router, up, down


def tokens(counts):
    draw = torch.Generator().manual_seed(8)
    return [torch.randn(count, D, generator=draw, dtype=torch.float64) for count in counts]


def layers_on_this_rank(ep_size, gated, counts, biases):
    return [layer_on_this_rank(ep_size, gated, counts, bias) for bias in biases]


def layer_on_this_rank(ep_size, gated, counts, bias):
    """Forward and backward; returns output, input gradient, and this rank's expert gradients by global id."""
    router_weight, up, down = weights(gated)
    router = Router(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    topology = ExpertTopology(E, ep_size, dist.get_world_size(), dist.get_rank())
    experts = StackedExperts(num_experts=topology.experts_per_rank, hidden_size=D, intermediate_size=F, gated_mlp=gated)
    layer = MoE(router=router, experts=experts, topology=topology, hidden_size=D)
    layer.set_deepspeed_parallelism()
    layer.double()
    router.selection_bias.copy_(torch.tensor(bias))
    with torch.no_grad():
        router.weight.copy_(router_weight)
        first, second = experts.parameters()
        first.copy_(up[topology.expert_ids])
        second.copy_(down[topology.expert_ids])
    x = tokens(counts)[dist.get_rank()].requires_grad_()
    out = layer(x)[0]
    (out * torch.arange(1.0, D + 1)).sum().backward()
    grads = dict(zip(topology.expert_ids, zip(first.grad, second.grad, strict=True), strict=True))
    return out.detach(), x.grad, router.weight.grad, grads


def plain_sum(x, gated, bias):
    """Each token's weighted sum over its experts, one token at a time."""
    router, up, down = (weight.requires_grad_() for weight in weights(gated))
    x = x.clone().requires_grad_()
    rows = []
    for token in x:
        scores = torch.softmax(router @ token, 0)
        chosen = sorted(range(E), key=lambda e: -(scores[e].item() + bias[e]))[:K]
        total = sum(scores[e] for e in chosen)
        inside = {e: silu(up[e, :F] @ token) * (up[e, F:] @ token if gated else 1) for e in chosen}
        rows.append(sum(scores[e] / total * (down[e] @ inside[e]) for e in chosen))
    out = torch.stack(rows) if rows else x * 0
    (out * torch.arange(1.0, D + 1)).sum().backward()
    zeros = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in (router, up, down)]
    return out.detach(), x.grad, *zeros


LOADS = {
    "random": [0.0] * E,
    "an expert without tokens": [0.0, 0.0, -9.0, 0.0],
    "a rank without rows": [9.0, 9.0, 0.0, 0.0],  # with two experts a rank, all rows go to one rank of each group
}


SPLITS = [(1, 1, False), (1, 1, True), (2, 1, False), (2, 2, False), (2, 2, True), (4, 2, True), (4, 4, False)]


@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    """(ranks' tokens, ep_size, gated, results by load) of a split; the second rank has no token of its own."""
    world_size, ep_size, gated = request.param
    counts = [5, 0, 7, 3][:world_size]
    results = run_ranks(world_size, layers_on_this_rank, ep_size, gated, counts, list(LOADS.values()))
    return counts, ep_size, gated, dict(zip(LOADS, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("load", LOADS)
def test_the_layer_equals_a_plain_sum_on_any_split(split, load):
    counts, ep_size, gated, results = split
    results, bias = results[load], LOADS[load]
    expected = [plain_sum(x, gated, bias) for x in tokens(counts)]
    for (out, x_grad, router_grad, _), (want, want_x, want_router, _, _) in zip(results, expected, strict=True):
        torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
        torch.testing.assert_close(x_grad, want_x, atol=1e-10, rtol=0)
        torch.testing.assert_close(router_grad, want_router, atol=1e-10, rtol=0)
    # An expert's gradient on a rank is that of all tokens in the rank's expert-parallel group.
    for rank, (*_, grads) in enumerate(results):
        group = range(rank // ep_size * ep_size, rank // ep_size * ep_size + ep_size)
        for expert, part in itertools.product(grads, (0, 1)):
            want = sum(expected[member][3 + part][expert] for member in group)
            torch.testing.assert_close(grads[expert][part], want, atol=1e-10, rtol=0)
