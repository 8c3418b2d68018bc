"""The layer over several ranks against a plain sum in float64."""

import itertools

import pytest
import torch
import torch.distributed as dist
from devices import assert_near, on_gpus
from ranks import run_ranks, this_device
from torch.nn.functional import silu

from megamoe.model.experts import StackedExperts
from megamoe.model.moe import MoE
from megamoe.model.router import Router
from megamoe.topology import ExpertTopology

D, F, E, K = 8, 16, 4, 2
EXACT, HALF = torch.float64, torch.bfloat16


def weights(gated, dtype):
    """Router, first and second matrices of the experts, in float64; numbers of `dtype`."""
    draw = torch.Generator().manual_seed(7)
    shapes = (E, D), (E, 2 * F if gated else F, D), (E, D, F)  # a gate's rows first
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).double() for shape in shapes]


def tokens(counts, dtype):
    draw = torch.Generator().manual_seed(8)
    return [torch.randn(count, D, generator=draw, dtype=torch.float64).to(dtype).double() for count in counts]


def layers_on_this_rank(dtype, ep_size, gated, counts, biases):
    return [layer_on_this_rank(dtype, ep_size, gated, counts, bias) for bias in biases]


def layer_on_this_rank(dtype, ep_size, gated, counts, bias):
    """Forward and backward; returns output, input gradient, and this rank's expert gradients by global id."""
    device = this_device()
    router_weight, up, down = weights(gated, dtype)
    router = Router(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    topology = ExpertTopology(E, ep_size, dist.get_world_size(), dist.get_rank())
    experts = StackedExperts(num_experts=topology.experts_per_rank, hidden_size=D, expert_size=F, gated_mlp=gated)
    layer = MoE(router=router, experts=experts, topology=topology, hidden_size=D)
    layer.set_deepspeed_parallelism()
    layer.to(device, dtype)
    router.selection_bias.copy_(torch.tensor(bias))
    with torch.no_grad():
        router.weight.copy_(router_weight)
        first, second = experts.parameters()
        first.copy_(up[topology.expert_ids])
        second.copy_(down[topology.expert_ids])
    x = tokens(counts, dtype)[dist.get_rank()].to(device, dtype).requires_grad_()
    out = layer(x)[0]
    (out * torch.arange(1.0, D + 1, device=device)).sum().backward()
    grads = dict(zip(topology.expert_ids, zip(first.grad.cpu(), second.grad.cpu(), strict=True), strict=True))
    return out.detach().cpu(), x.grad.cpu(), router.weight.grad.cpu(), grads


def plain_sum(x, gated, bias, dtype):
    """Each token's weighted sum over its experts, one token at a time."""
    router, up, down = (weight.requires_grad_() for weight in weights(gated, dtype))
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


SPLITS = [
    ("cpu", EXACT, 1, 1, False), ("cpu", EXACT, 1, 1, True), ("cpu", EXACT, 2, 1, False), ("cpu", EXACT, 2, 2, False),
    ("cpu", EXACT, 2, 2, True), ("cpu", EXACT, 4, 2, True), ("cpu", EXACT, 4, 4, False), ("cpu", HALF, 2, 2, False),
    *(on_gpus(1, ("cuda", dtype, 1, 1, False)) for dtype in (EXACT, HALF)),
    *(on_gpus(2, ("cuda", dtype, 2, 2, False)) for dtype in (EXACT, HALF)),
]  # fmt: skip


@pytest.fixture(scope="module", params=SPLITS, ids=str)
def split(request):
    """(dtype, ranks' tokens, ep_size, gated, results by load) of a split; the second rank has no token of its own."""
    device, dtype, world_size, ep_size, gated = request.param
    counts = [5, 0, 7, 3][:world_size]
    biases = list(LOADS.values())
    results = run_ranks(world_size, layers_on_this_rank, dtype, ep_size, gated, counts, biases, device=device)
    return dtype, counts, ep_size, gated, dict(zip(LOADS, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("load", LOADS)
def test_the_layer_equals_a_plain_sum_on_any_split(split, load):
    dtype, counts, ep_size, gated, results = split
    results, bias = results[load], LOADS[load]
    expected = [plain_sum(x, gated, bias, dtype) for x in tokens(counts, dtype)]
    for (out, x_grad, router_grad, _), (want, want_x, want_router, _, _) in zip(results, expected, strict=True):
        assert_near(out, want, dtype)
        assert_near(x_grad, want_x, dtype)
        assert_near(router_grad, want_router, dtype)
    # An expert's gradient on a rank is that of all tokens in the rank's expert-parallel group.
    for rank, (*_, grads) in enumerate(results):
        group = range(rank // ep_size * ep_size, rank // ep_size * ep_size + ep_size)
        for expert, part in itertools.product(grads, (0, 1)):
            want = sum(expected[member][3 + part][expert] for member in group)
            assert_near(grads[expert][part], want, dtype)
