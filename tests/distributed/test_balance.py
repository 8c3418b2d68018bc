"""Loss-free balancing inside DeepSpeed's engine, over several ranks."""

import torch
from ranks import run_ranks
from toy import PRESET, SHIPPED, ds_config

from megamoe.config import ModelConfig, read_json
from megamoe.ds_config import read_schedule
from megamoe.engine import build_engine
from megamoe.model import Decoder
from megamoe.router import LoadBalancer


def engine_on_this_rank(ds, ep_size):
    rank = torch.distributed.get_rank()
    model = Decoder(ModelConfig(**PRESET), 0, ep_size, rank % ep_size)
    engine = build_engine(model, ds, read_schedule(ds, "test"))
    return engine, LoadBalancer(model.routers(), rate=0.01, rule="sign", decay=0.9)


def tokens(step):
    draw = torch.Generator().manual_seed(100 * torch.distributed.get_rank() + step)
    return torch.randint(0, PRESET["vocab_size"], (2, 16), generator=draw)


def statistics(engine):
    return [(router.selection_bias.clone(), router.running_load.clone()) for router in engine.module.routers()]


def three_steps(ds, ep_size):
    engine, balancer = engine_on_this_rank(ds, ep_size)
    own, reported = [], []
    for step in range(3):
        engine.backward(engine(tokens(step), tokens(step + 1)))
        own.append(torch.stack([router.step_counts.clone() for router in engine.module.routers()]))
        engine.step()
        reported.append(balancer.step(engine.was_step_applied()).counts)
    return statistics(engine), own, reported


def test_statistics_are_fp32_and_identical_on_all_ranks():
    results = run_ranks(4, three_steps, read_json(SHIPPED / "zero2.json"), 2)  # bf16
    first = results[0][0]
    for layers, _, _ in results:
        for (bias, load), (first_bias, first_load) in zip(layers, first, strict=True):
            assert bias.dtype == load.dtype == torch.float32
            assert torch.equal(bias, first_bias)
            assert torch.equal(load, first_load)
    assert any(bias.abs().max() > 0 for bias, _ in first)


def test_counts_are_the_sum_over_ranks_and_every_slot_is_counted_once():
    results = run_ranks(2, three_steps, ds_config(2), 1)
    for step in range(3):
        total = sum(own[step] for _, own, _ in results)
        assert torch.equal(results[0][2][step], total)
        assert total.sum(1).tolist() == [2 * 2 * 16 * PRESET["num_experts_per_tok"]] * PRESET["num_hidden_layers"]


def evaluate_and_skip(ds):
    engine, balancer = engine_on_this_rank(ds, 2)
    before = statistics(engine)
    engine.eval()
    with torch.no_grad():
        engine(tokens(0), tokens(1))
    engine.train()
    counted_in_evaluation = sum(int(router.step_counts.sum()) for router in engine.module.routers())
    engine.backward(engine(tokens(0), tokens(1)) * (torch.inf if torch.distributed.get_rank() == 0 else 1.0))
    engine.step()
    balance = balancer.step(engine.was_step_applied())
    left = sum(int(router.step_counts.sum()) for router in engine.module.routers())
    return before, statistics(engine), counted_in_evaluation, balance, left, engine.skipped_steps, engine.get_lr()[0]


def test_evaluation_and_a_step_skipped_for_one_ranks_infinity_move_nothing_anywhere():
    for result in run_ranks(2, evaluate_and_skip, read_json(SHIPPED / "zero2.json")):
        before, after, counted_in_evaluation, balance, left, skipped, lr = result
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[0], new[0])
            assert torch.equal(old[1], new[1])
        assert counted_in_evaluation == 0
        assert balance is None
        assert left == 0
        assert skipped == 1
        assert lr == 0  # the schedule did not move either
