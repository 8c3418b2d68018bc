"""Loss-free balancing: the rules on one rank, and inside DeepSpeed's engine over several."""

import math

import pytest
import torch
from ranks import run_ranks
from toy import PRESET, recipe_of, shipped

from megamoe.config.model import ModelConfig
from megamoe.data.batches import Batch
from megamoe.model.decoder import Decoder
from megamoe.model.moe import DroplessDispatch
from megamoe.model.router import Router
from megamoe.model.topology import ExpertTopology
from megamoe.training.balancing import Balance, LoadBalancer
from megamoe.training.step import balancer_of, build_train_step

CONFIG = ModelConfig(**PRESET, router_bias_rate=0.01)
QUANTILE = ModelConfig(**PRESET, router_bias_rule="quantile")


def router_with(experts, top_k=2, **options):
    return Router(hidden_size=16, num_local_experts=experts, num_experts_per_tok=top_k, **options)


def routers_that_counted(*counts, **options):
    routers = []
    for count in counts:
        routers.append(router_with(len(count), **options))
        routers[-1].step_counts += torch.tensor(count)
    return routers


def step(balancer):
    """An applied step of the only rank."""
    counts = balancer.take_counts()
    running = balancer.next_loads(counts)
    balancer.apply(running, balancer.take_margins().double())
    return Balance(counts, running, [])


# Shares [.75 .125 .125 0] and [0 .125 .25 .625]; the running mean starts at 1/4 and takes a tenth of them.
COUNTS = [6, 1, 1, 0], [0, 1, 2, 5]
RUNNING = [[0.3, 0.2375, 0.2375, 0.225], [0.225, 0.2375, 0.25, 0.2875]]


@pytest.mark.parametrize(
    ("rule", "biases"),
    [
        ("sign", [[-0.015, 0.005, 0.005, 0.005]]),  # the other layer has a load that is even but for rounding
        ("proportional", [[-0.002, 0.0005, 0.0005, 0.001], [0.001, 0.0005, 0.0, -0.0015]]),  # (1/4 - running) / (1/4)
        ("sign", []),
    ],
    ids=["sign", "proportional", "without a bias"],
)
def test_a_step_takes_a_tenth_of_the_batch_into_the_running_mean_and_moves_the_bias_with_its_mean_taken_out(
    rule, biases
):
    routers = routers_that_counted(*COUNTS, router_bias=bool(biases))
    balance = step(LoadBalancer(routers, 0.01, rule, 0.9))
    for router, bias in zip(routers, biases, strict=False):
        torch.testing.assert_close(router.selection_bias, torch.tensor(bias), rtol=1e-5, atol=1e-8)
    for router, running in zip(routers, RUNNING, strict=True):
        torch.testing.assert_close(router.running_load, torch.tensor(running))
        assert router.step_counts.tolist() == [0, 0, 0, 0]
    assert balance.counts.tolist() == [list(count) for count in COUNTS]
    torch.testing.assert_close(balance.batch_max_vio, torch.tensor([2.0, 1.5]))
    torch.testing.assert_close(balance.running_max_vio, torch.tensor([0.2, 0.15]))


@pytest.mark.parametrize(("score", "sharpness", "experts", "top_k"), [("softmax", 0.05, 8, 2), ("sigmoid", 1.0, 32, 3)])
def test_by_quantiles_a_skewed_router_is_in_balance_after_ten_steps_and_the_same_on_any_split(
    score, sharpness, experts, top_k
):
    whole, split = (router_with(experts, top_k, router_score=score, counts_margins=True) for _ in range(2))
    for router in (whole, split):
        draw = torch.Generator().manual_seed(1)
        torch.nn.init.normal_(router.weight, 0, sharpness, generator=draw)
        with torch.no_grad():
            router.weight[:2, 0] = 4 * sharpness  # every token has a 1 in dimension 0
    layers = [DroplessDispatch(router, torch.nn.Identity(), ExpertTopology(experts)) for router in (whole, split)]
    history = []
    for _ in range(30):
        tokens = torch.randn(2048, 16, generator=draw)
        tokens[:, 0] = 1
        for layer, parts in zip(layers, (1, 4), strict=True):
            for part in tokens.chunk(parts):
                routing = layer.router(part)
                layer.count_for_balancing(routing.counts, torch.zeros(()), routing.margins)
        history.append(step(LoadBalancer([whole], 0, "quantile", 0.9)))
        step(LoadBalancer([split], 0, "quantile", 0.9))
        torch.testing.assert_close(split.selection_bias, whole.selection_bias)
    assert history[0].batch_max_vio > 0.9
    assert all(balance.batch_max_vio < 0.4 for balance in history[10:])
    assert all(balance.running_max_vio < 0.1 for balance in history[-5:])


def test_a_quantile_bias_of_rate_0_stays_and_counts_nothing():
    model = Decoder(QUANTILE.model_copy(update={"router_bias_rate": 0}))
    balancer, ids = balancer_of(model), torch.arange(32).view(2, 16)
    model(ids, ids)
    counts, margins = balancer.take_counts(), balancer.take_margins()
    assert margins.numel() == 0
    balancer.apply(balancer.next_loads(counts), margins)
    for router in model.routers():
        assert not router.selection_bias.any()
        assert not torch.equal(
            router.running_load, torch.full_like(router.running_load, 1 / PRESET["num_local_experts"])
        )


# --- inside the engine, over several ranks ---


def tokens(step):
    draw = torch.Generator().manual_seed(100 * torch.distributed.get_rank() + step)
    return torch.randint(0, PRESET["vocab_size"], (2, 16), generator=draw)


def statistics(engine):
    return [(router.selection_bias.clone(), router.running_load.clone()) for router in engine.module.routers()]


def three_steps(ds, ep_size, config=CONFIG):
    train_step = build_train_step(config, recipe_of(ds), ep_size=ep_size)
    own, reported, tokens_of = [], [], ds["train_micro_batch_size_per_gpu"] * 16
    for number in range(3):
        train_step.forward_backward([Batch(tokens(number), tokens(number + 1))])
        own.append(torch.stack([router.step_counts.clone() for router in train_step.model.routers()]))
        means = [moe.deepspeed_moe.step_entropy.item() / tokens_of for moe in train_step.model.moe_layers()]
        reported.append((train_step.update().balance, means))
    return statistics(train_step.engine), own, reported


@pytest.mark.parametrize("config", [CONFIG, QUANTILE], ids=["sign", "quantile"])
def test_statistics_are_fp32_and_identical_on_all_ranks_and_every_slot_is_counted_once(config):
    ds = shipped("zero2")  # bf16
    results = run_ranks(4, three_steps, ds, 2, config)
    first = results[0][0]
    for layers, _, _ in results:
        for (bias, load), (first_bias, first_load) in zip(layers, first, strict=True):
            assert bias.dtype == load.dtype == torch.float32
            assert torch.equal(bias, first_bias)
            assert torch.equal(load, first_load)
    assert any(bias.abs().max() > 0 for bias, _ in first)
    slots = 4 * 2 * 16 * PRESET["num_experts_per_tok"]
    for step in range(3):
        total = sum(own[step] for _, own, _ in results)
        balance = results[0][2][step][0]
        assert torch.equal(balance.counts, total)
        assert total.sum(1).tolist() == [slots] * PRESET["num_hidden_layers"]
        means = [reported[step][1] for _, _, reported in results]
        assert balance.entropies == pytest.approx([sum(all_) / 4 for all_ in zip(*means, strict=True)], rel=1e-6)
        assert 0.5 < min(balance.entropies) < max(balance.entropies) < math.log(PRESET["num_local_experts"])
