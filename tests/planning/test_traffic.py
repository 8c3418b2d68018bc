import itertools
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from toy import PRESET, SLOW, ds_config, recipe_of, run_and_hear, train_here, write_inputs

from megamoe.config.model import ModelConfig
from megamoe.model.costs import parameter_count
from megamoe.model.decoder import Decoder, loss_parts
from megamoe.planning.sharding import read_setup
from megamoe.planning.traffic import (
    LATENCY_BETWEEN,
    LATENCY_INSIDE,
    Collective,
    collectives,
    describe_traffic,
    host_transfers,
)
from megamoe.training.collectives import Collectives
from megamoe.training.step import balancer_of
from megamoe.training.step_sums import NO_FLAGS, sum_over_ranks

SETUP = read_setup(ModelConfig(**PRESET), recipe_of(ds_config(2), 16), 4, 16, False)


def sent_by_counting(kind, ranks, stride, payload, gpus_per_node):
    """Bytes that leave rank 0 for its own node and for others, pair by pair."""
    node = [rank * stride // gpus_per_node for rank in range(ranks)]
    if kind == "all_to_all":
        ways = [payload / ranks if other else 0 for other in range(ranks)]
        return (
            sum(size for other, size in enumerate(ways) if node[other] == node[0]),
            sum(size for other, size in enumerate(ways) if node[other] != node[0]),
        )
    members, nodes = node.count(0), len(set(node))
    inside = sum(payload / members for _ in range(members - 1))  # each member gets its part of what this rank has
    between = sum(payload / members / nodes for _ in range(nodes - 1))  # and each node its part of that
    return (2 * inside, 2 * between) if kind == "all_reduce" else (inside, between)


def test_bytes_sent_inside_and_between_nodes():
    groups = ((8, 1, 8), (2, 1, 2), (16, 1, 8), (1024, 1, 8), (128, 8, 1), (32, 2, 4), (4, 16, 1))
    for kind, (ranks, stride, members) in product(("all_to_all", "all_reduce", "all_gather", "reduce"), groups):
        one = Collective("test", kind, ranks, stride, 3, 1_000_000, "update")
        assert one.nodes(8) == (members, -(-ranks * stride // max(8, stride)))
        assert one.sent(8) == pytest.approx(sent_by_counting(kind, ranks, stride, 1_000_000, 8))


def test_seconds_are_those_of_the_links_and_of_every_call():
    device = replace(SLOW, inside=1e6)
    one = Collective("test", "all_to_all", 4, 1, 10, 4000, "update")
    assert one.seconds(device, 4, 0.5) == pytest.approx(3000 / 1e6 / 0.5 + 10 * LATENCY_INSIDE)
    assert one.seconds(device, 2, 0.5) == pytest.approx(1000 / 1e6 / 0.5 + 2000 / 1e5 / 0.5 + 10 * LATENCY_BETWEEN)
    assert replace(one, ranks=1).seconds(device, 4, 0.5) == 0


def payload(setup, *words):
    return sum(one.payload for one in collectives(setup) if all(word in one.purpose for word in words))


def test_accumulation_multiplies_what_its_zero_stage_reduces():
    thrice = replace(SETUP, accumulation=3)
    assert payload(thrice, "rows to experts") == 3 * payload(SETUP, "rows to experts") > 0
    assert payload(thrice, "gradients of") == 3 * payload(SETUP, "gradients of") > 0
    assert payload(replace(thrice, zero_stage=1), "gradients of") == payload(SETUP, "gradients of")
    assert payload(thrice, "updated") == payload(SETUP, "updated") > 0


def test_a_token_travels_once_to_each_rank_that_has_experts_of_it_and_results_come_back_once():
    setup = replace(SETUP, ep_size=2, recompute_blocks=1)  # two of four experts on each rank, two of them a token's
    rows = setup.weight_bytes * setup.tokens * setup.model.hidden_size * 5 / 3  # one rank for 2 of 6 pairs of experts
    layers = len(setup.model.sparse_blocks)
    assert payload(setup, "rows to experts, recomputed") == pytest.approx(rows, rel=0.01)
    assert not payload(replace(setup, recompute="selective"), "recomputed")
    for way in itertools.product(("rows to", "rows from"), ("forward", "backward")):
        assert payload(setup, *way) == pytest.approx(layers * rows, rel=0.01)


def test_without_expert_parallelism_no_rows_travel():
    alone = replace(SETUP, ep_size=1)
    assert not [one for one in collectives(alone) if one.kind == "all_to_all"]
    assert not [one for one in collectives(replace(alone, world_size=1)) if one.kind == "all_gather"]


def test_bf16_sums_of_an_offloaded_optimizer_go_there_and_back_for_every_micro_batch():
    once = replace(SETUP, world_size=1, ep_size=1, offload=True, weight_bytes=2, sum_bytes=2)
    size = 2 * parameter_count(SETUP.model)
    plain, thrice = host_transfers(once), host_transfers(replace(once, accumulation=3))
    assert thrice == (plain[0] + 3 * size, plain[1] + 2 * size)
    assert host_transfers(replace(once, accumulation=3, zero_stage=1)) == plain
    assert host_transfers(replace(once, accumulation=3, sum_bytes=4)) == plain
    assert host_transfers(replace(once, offload=False)) == (0, 0)


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_what_is_small_is_the_vector_that_a_step_sums(monkeypatch, rule):
    model, summed = SETUP.model.model_copy(update={"router_bias_rule": rule}), []
    monkeypatch.setattr(torch.distributed, "all_reduce", summed.append)
    layers = len(model.sparse_blocks)
    counts = torch.zeros(layers, model.num_local_experts, dtype=torch.int64)
    margins = balancer_of(Decoder(model)).take_margins()
    losses = torch.zeros(2 * len(loss_parts(model)))
    sum_over_ranks(0.0, losses, NO_FLAGS, counts, torch.zeros(layers), margins)
    assert payload(replace(SETUP, model=model), "norm, loss") == summed[0].nbytes


def test_a_run_ends_with_the_collectives_of_megamoe_and_of_deepspeed_next_to_what_is_predicted(tmp_path):
    ds = ds_config(2, accumulation=2, comms_logger={"enabled": True})
    ds["zero_optimization"].update(stage=2, reduce_bucket_size=5000)
    run = {**write_inputs(tmp_path, ds), "run_dir": str(tmp_path / "run"), "ep_size": 2, "steps": 3, "log_interval": 9}
    run["data"] += [shutil.copytree(run["data"][0], tmp_path / "other")]
    text = run_and_hear(4, train_here, {**run, "data": list(map(str, run["data"]))})[1]
    assert "means of 3 steps" in text
    rows = [line.replace(",", "").split() for line in text.partition("predicted bytes\n")[2].splitlines()]
    found = {(kind, ranks): tuple(map(float, numbers)) for kind, ranks, *numbers in rows}
    others = {(kind, ranks) for kind in ("all_gather", "all_reduce") for ranks in "24"}
    assert found.keys() == {*others, ("all_to_all", "2")}
    calls, size, expected = found.pop(("all_to_all", "2"))
    assert calls == 2 * 2 * 7  # micro-batches, layers, and what each sends
    assert size == pytest.approx(expected, rel=0.2)  # as many rows to each rank are predicted
    assert all(size == expected > 0 for _, size, expected in found.values())


def test_without_a_prediction_none_is_shown():
    found = Collectives()
    found.entered, found.calls["reduce", 8], found.payload["reduce", 8] = 4, 2, 4096
    assert describe_traffic(found, None).splitlines()[-1].split() == ["reduce", "8", "0.5", "1,024", "-"]
