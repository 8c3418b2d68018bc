"""The layer as DeepSpeed and the balancer take it. What it computes is in test_expert_parallel.py."""

import math

import deepspeed.moe.layer
import pytest
import torch
from devices import close
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamoe.model.experts import StackedExperts
from megamoe.model.moe import MoE
from megamoe.model.router import Router
from megamoe.model.router_losses import RouterLosses
from megamoe.model.topology import ExpertTopology

D, F, E, T = 8, 16, 4, 9


def layer_with(**options):
    """In float64; the options are the router's."""
    torch.manual_seed(0)
    router = Router(hidden_size=D, num_local_experts=E, num_experts_per_tok=2, **options)
    experts = StackedExperts(num_experts=E, hidden_size=D, expert_size=F)
    layer = MoE(router=router, experts=experts, topology=ExpertTopology(E), hidden_size=D).double()
    for weight in layer.parameters():
        nn.init.normal_(weight, 0, 0.5)
    return layer


def test_the_losses_of_the_router_come_with_the_output_where_it_has_any():
    assert layer_with()(torch.randn(T, D, dtype=torch.float64))[1] is None
    layer = layer_with(losses=RouterLosses(balance="sequence", z=True))
    router, x = layer.router, torch.randn(2, 5, D, dtype=torch.float64)
    losses = layer(x)[1]
    assert torch.equal(losses, router(x.flatten(0, 1), num_sequences=2).losses)
    assert not torch.equal(losses, layer(x.flatten(0, 1))[1])  # one sequence of ten tokens
    used = torch.tensor([0, 2, 3, 7])  # the means are over all positions, a sequence's balance by its own tokens
    (first, z), (second, other_z) = (router(x.flatten(0, 1)[rows]).losses for rows in (used[:3], used[3:]))
    close(layer(x, used)[1], torch.stack((3 * first + second, 3 * z + other_z)) / 10)
    for kind in ("global_batch", "micro_batch"):
        router.losses = RouterLosses(balance=kind)
        close(layer(x, used)[1], router(x.flatten(0, 1)[used]).losses * 4 / 10)
    assert layer(x, used[:0])[1].tolist() == [0, 0]


def test_unused_tokens_reach_no_expert_and_give_0():
    layer = layer_with()
    for used in ([[True, False, True, True], [False, False, True, False]], [[False] * 4] * 2):
        x, used = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True), torch.tensor(used)
        layer.zero_grad()
        output, _, counts = layer(x, used.flatten().nonzero().squeeze(1))
        output.square().sum().backward()
        alone, _, alone_counts = layer(x[used])
        close(output[used], alone)
        assert torch.equal(counts, alone_counts)
        assert counts.sum() == 2 * used.sum()
        assert not output[~used].any()
        assert not x.grad[~used].any()
        assert x.grad[used].all()
    assert not any(weight.grad.any() for weight in layer.parameters())  # which all have one


# --- what is counted for the balancer -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_slots_and_the_entropy_of_scores_add_up_over_training_passes_and_evaluation_counts_nothing(score):
    layer = layer_with(router_score=score)
    slots, expected = torch.zeros(E, dtype=torch.int64), 0.0
    for tokens in (5, T):
        x = torch.randn(tokens, D, dtype=torch.float64)
        logits = x @ layer.router.weight.T
        shares = (logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)).detach()
        shares /= shares.sum(-1, keepdim=True)
        expected -= (shares * shares.log()).sum().item()
        slots += layer(x)[2]
    layer.eval()
    layer(torch.randn(T, D, dtype=torch.float64))
    assert torch.equal(layer.router.step_counts, slots)
    assert layer.deepspeed_moe.step_entropy.item() == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < (5 + T) * math.log(E)


def test_deepspeed_takes_the_layer_for_its_own():
    layer = layer_with()
    assert isinstance(layer, deepspeed.moe.layer.MoE)
    assert layer.num_local_experts == E
    for name, weight in layer.named_parameters():
        is_expert = "router" not in name
        assert getattr(weight, "allreduce", True) != is_expert  # how its engine tells expert parameters from others
        assert not is_expert or weight.group_name == "ep_size_1"
