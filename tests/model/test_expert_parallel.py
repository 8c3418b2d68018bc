"""The layer over several ranks against a plain sum in float64."""

import itertools

import formulas
import pytest
import torch
import torch.distributed as dist
from devices import assert_near, on_gpus
from ranks import run_ranks

from megamoe.launch.distributed import this_device
from megamoe.model.experts import StackedExperts
from megamoe.model.moe import MoE
from megamoe.model.router import Router
from megamoe.model.topology import ExpertTopology

D, F, E = 8, 16, 4
EXACT, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16


def weights(gated, dtype):
    """Router, first and second matrices of the experts, in float64; numbers of `dtype`."""
    draw = torch.Generator().manual_seed(7)
    shapes = (E, D), (E, 2 * F if gated else F, D), (E, D, F)  # a gate's rows first
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).double() for shape in shapes]


def tokens(counts, dtype):
    draw = torch.Generator().manual_seed(8)
    return [torch.randn(count, D, generator=draw, dtype=torch.float64).to(dtype).double() for count in counts]


def layers_on_this_rank(splits, counts, biases):
    return [[layer_on_this_rank(*split, counts, bias) for bias in biases] for split in splits]


def layer_on_this_rank(dtype, ep_size, gated, top_k, counts, bias):
    """Forward and backward; returns output, input gradient, and this rank's expert gradients by global id."""
    device = this_device()
    router_weight, up, down = weights(gated, dtype)
    router = Router(hidden_size=D, num_local_experts=E, num_experts_per_tok=top_k)
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


def plain_sum(x, gated, top_k, bias, dtype):
    """The formula's output, and the gradients of the input and of each weight."""
    inputs = [one.clone().requires_grad_() for one in (x, *weights(gated, dtype))]
    out, _ = formulas.expert_layer(*inputs, bias, top_k)
    (out * torch.arange(1.0, D + 1)).sum().backward()
    return out.detach(), *(torch.zeros_like(one) if one.grad is None else one.grad for one in inputs)


LOADS = {
    "random": [0.0] * E,
    "an expert without tokens": [0.0, 0.0, -9.0, 0.0],
    "a rank without rows": [9.0, 9.0, 0.0, 0.0],  # with two experts a rank, all rows go to one rank of each group
}


# (dtype, ep_size, gated, choices of a token) of layers; the second rank has no token of its own.
SPLITS = {
    1: [(EXACT, 1, False, 2), (SINGLE, 1, True, 2), (HALF, 1, False, 2), (HALF, 1, True, 2)],
    2: [(EXACT, 2, False, 2), (HALF, 2, False, 2)],
    4: [
        (EXACT, 1, True, 2), (EXACT, 1, False, 3), (EXACT, 2, False, E), (EXACT, 2, True, 3), (EXACT, 4, False, 2),
        (SINGLE, 1, True, 2), (HALF, 2, False, 2),
    ],
}  # fmt: skip
COUNTS = [5, 0, 7, 3]


@pytest.mark.parametrize(("device", "world_size"), [("cpu", 4), on_gpus(1, "cuda", 1), on_gpus(2, "cuda", 2)])
def test_the_layer_equals_a_plain_sum_on_any_split(device, world_size):
    counts, biases = COUNTS[:world_size], list(LOADS.values())
    of_ranks = run_ranks(world_size, layers_on_this_rank, SPLITS[world_size], counts, biases, device=device)
    for split, by_load in zip(SPLITS[world_size], zip(*of_ranks, strict=True), strict=True):
        for load, results in zip(LOADS, zip(*by_load, strict=True), strict=True):
            check_split(*split, load, counts, results)


def check_split(dtype, ep_size, gated, top_k, load, counts, results):
    """Compare the results of the ranks."""
    what = f"{load}, {dtype}, ep_size {ep_size}, gated {gated}, {top_k} choices:"
    expected = [plain_sum(x, gated, top_k, LOADS[load], dtype) for x in tokens(counts, dtype)]
    for found, (want, want_x, want_router, *_) in zip(results, expected, strict=True):
        assert_near(found[0], want, dtype, f"{what} output")
        assert_near(found[1], want_x, dtype, f"{what} gradient of the input")
        assert_near(found[2], want_router, dtype, f"{what} gradient of the router")
    # An expert's gradient on a rank is that of all tokens in the rank's expert-parallel group.
    for rank, (*_, grads) in enumerate(results):
        group = range(rank // ep_size * ep_size, rank // ep_size * ep_size + ep_size)
        for expert, part in itertools.product(grads, (0, 1)):
            want = sum(expected[member][3 + part][expert] for member in group)
            assert_near(grads[expert][part], want, dtype, f"{what} gradient of expert {expert}")
