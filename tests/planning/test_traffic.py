from dataclasses import replace

import pytest
from toy import PRESET, SHIPPED, ds_config

from megamoe.config import ModelConfig, load_preset
from megamoe.hardware import DEVICES, Device
from megamoe.json_files import read_json
from megamoe.model.costs import parameter_count, train_flops_per_token
from megamoe.planning.sharding import read_setup
from megamoe.planning.traffic import LATENCY_BETWEEN, LATENCY_INSIDE, Collective, collectives, host_transfers, step_time

SETUP = read_setup(ModelConfig(**PRESET), ds_config(2), 16, 4, 16, False)

SLOW = Device("slow", 1e12, 1e12, 1e9, 1e9, inside=1e5, between=1e5, host=1e6, host_memory_rate=1e8)


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


@pytest.mark.parametrize("kind", ["all_to_all", "all_reduce", "all_gather", "reduce"])
@pytest.mark.parametrize(
    ("ranks", "stride", "members"),
    [(8, 1, 8), (2, 1, 2), (16, 1, 8), (1024, 1, 8), (128, 8, 1), (32, 2, 4), (4, 16, 1)],
)
def test_bytes_sent_inside_and_between_nodes(kind, ranks, stride, members):
    one = Collective("test", kind, ranks, stride, 3, 1_000_000)
    assert one.nodes(8) == (members, -(-ranks * stride // max(8, stride)))
    assert one.sent(8) == pytest.approx(sent_by_counting(kind, ranks, stride, 1_000_000, 8))


def test_seconds_are_those_of_the_links_and_of_every_call():
    device = replace(SLOW, inside=1e6)
    one = Collective("test", "all_to_all", 4, 1, 10, 4000)
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


def test_without_expert_parallelism_no_rows_travel():
    alone = replace(SETUP, ep_size=1)
    assert not [one for one in collectives(alone) if one.kind == "all_to_all"]
    assert not [one for one in collectives(replace(alone, world_size=1)) if one.kind == "all_gather"]


def test_time_of_a_step_by_hand():
    setup = read_setup(load_preset("moe-680m"), ds_config(2), 1, 1, 1024, False)
    setup = replace(setup, weight_bytes=2, sum_bytes=4, wire_bytes=2)
    times = step_time(setup, DEVICES["h100"], 8, efficiency=0.5, link_efficiency=1.0)
    flops = train_flops_per_token(setup.model, 1024) * 2048
    assert times.compute == pytest.approx(flops / (989e12 * 0.5))
    assert times.optimizer == pytest.approx(30 * 679_809_792 / 3.35e12, rel=1e-4)  # rounded up to whole alignments
    assert times.communication == 0
    assert times.tokens_per_second == pytest.approx(2048 / (times.compute + times.optimizer))
    assert times.mfu == pytest.approx(0.5 * times.compute / times.seconds)
    assert step_time(replace(setup, weight_bytes=4), DEVICES["h100"], 8, 0.5, 1.0).compute == pytest.approx(
        flops / (67e12 * 0.5)
    )


def test_an_offloaded_optimizer_waits_for_the_host():
    ds = read_json(SHIPPED / "zero2_offload.json")
    setup = read_setup(load_preset("moe-680m"), ds, 1, 1, 1024, False)
    weights, kept = 679_809_792, replace(setup, offload=False)
    there, here = [step_time(one, DEVICES["h100"], 8, efficiency=0.5, link_efficiency=0.5) for one in (setup, kept)]
    assert there.host == pytest.approx((4 + 2) * weights / (64e9 * 0.5), rel=1e-4)  # fp32 gradients, bf16 weights
    assert there.optimizer == pytest.approx(30 * weights / 76.8e9, rel=1e-4)
    assert there.seconds == pytest.approx(here.compute + there.communication + there.optimizer + there.host)
    assert here.host == 0
    lion = read_setup(load_preset("moe-680m"), read_json(SHIPPED / "zero2_lion.json"), 1, 1, 1024, False)
    assert step_time(lion, DEVICES["h100"], 8, 0.5, 0.5).optimizer == pytest.approx(22 * weights / 76.8e9, rel=1e-4)


def test_bf16_sums_of_an_offloaded_optimizer_go_there_and_back_for_every_micro_batch():
    once = replace(SETUP, world_size=1, ep_size=1, offload=True, weight_bytes=2, sum_bytes=2)
    size = 2 * parameter_count(SETUP.model)
    plain, thrice = host_transfers(once), host_transfers(replace(once, accumulation=3))
    assert thrice == (plain[0] + 3 * size, plain[1] + 2 * size)
    assert host_transfers(replace(once, accumulation=3, zero_stage=1)) == plain
    assert host_transfers(replace(once, accumulation=3, sum_bytes=4)) == plain
    assert host_transfers(replace(once, offload=False)) == (0, 0)


def test_recomputed_blocks_cost_their_forward_pass_again():
    half = SETUP.model.num_hidden_layers // 2
    tokens = SETUP.tokens
    flops = train_flops_per_token(SETUP.model, SETUP.seq_len)
    head = 6 * SETUP.model.vocab_size * SETUP.model.hidden_size
    plain, again = [
        step_time(replace(SETUP, recompute_blocks=blocks), DEVICES["h100"], 8, 0.5, 1.0).compute for blocks in (0, half)
    ]
    assert again - plain == pytest.approx((flops - head) * tokens / 3 / 2 / (67e12 * 0.5))
    assert payload(replace(SETUP, recompute_blocks=half), "forward") == 1.5 * payload(SETUP, "forward")


def test_zero_1_hides_what_it_reduces_behind_one_micro_batch_only():
    setup = replace(SETUP, seq_len=4096, accumulation=4, overlap=True, zero_stage=1)
    real, plain = [step_time(replace(setup, overlap=overlap), SLOW, 8, 1.0, 1.0) for overlap in (True, False)]
    assert plain.communication - real.communication == pytest.approx(real.compute * 2 / 3 / 4)


def test_reducing_gradients_hides_behind_two_thirds_of_the_compute():
    wide = replace(SETUP, seq_len=4096)
    fast = replace(SLOW, inside=1e9, between=1e9)
    for device, hides in ((fast, True), (SLOW, False)):
        hidden = sum(one.seconds(device, 8, 1.0) for one in collectives(wide) if "gradients of" in one.purpose)
        real = step_time(replace(wide, overlap=True), device, 8, 1.0, 1.0)
        plain = step_time(replace(wide, overlap=False), device, 8, 1.0, 1.0)
        assert (hidden < real.compute * 2 / 3) == hides
        saved = min(hidden, real.compute * 2 / 3)
        assert plain.communication - real.communication == pytest.approx(saved)
