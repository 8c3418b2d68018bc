import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from operators import Operators
from ranks import run_ranks
from toy import PRESET, SLOW, ds_config, recipe_of, shipped

from megamoe.config.model import ModelConfig, load_preset
from megamoe.data.batches import Batch
from megamoe.model.costs import train_flops_per_token
from megamoe.model.decoder import Decoder
from megamoe.model.loss import GPU_LOGITS
from megamoe.planning.model_trace import model_trace
from megamoe.planning.rates import GPU, Rates
from megamoe.planning.sharding import read_setup
from megamoe.planning.step_time import (
    ENGINE_OPERATORS,
    MUON_OPERATORS,
    UPDATE_OPERATORS,
    Phase,
    gradient_bytes,
    gradient_operators,
    step_time,
)
from megamoe.planning.traffic import collectives
from megamoe.training.matrix_share import MatrixShare
from megamoe.training.muon import orthogonalize_share
from megamoe.training.step import build_train_step
from megamoe.utils.data_sheets import DEVICES

SETUP = read_setup(ModelConfig(**PRESET), recipe_of(ds_config(2), 16), 4, 16, False)
FULL = read_setup(load_preset("moe-680m"), recipe_of(shipped("zero2")), 1, 1024, False)
# Only what a test changes takes time.
IDEAL = Rates(math.inf, math.inf, math.inf, links=1.0, operator=0.0, region=0.0, parameter=0.0, wait=0.0)


def operators(setup, phase):
    """Of each block, and of what is around them."""
    trace = model_trace(setup)
    return [block.work[phase].operators for block in trace.blocks.values()], trace.around.work[phase].operators


def phases(setup, device=DEVICES["h100"], rates=GPU):
    return {phase.name: phase for phase in step_time(setup, device, 8, rates).phases}


def test_a_phase_takes_the_longer_of_host_and_device_and_what_waits():
    phase = Phase("test", 3.0, {"gemms": 2.0, "memory": 2.5}, waits=0.5)
    assert (phase.seconds, phase.limit) == (5.0, "memory")
    assert phase.parts == {"gemms": 2.0, "memory": 2.5, "waits": 0.5}
    slow_host = replace(phase, launches=6.0)
    assert slow_host.parts == {"launches": 6.0, "waits": 0.5}
    assert slow_host.limit == "launches"
    assert replace(phase, is_serial=True).seconds == 3.0 + 4.5 + 0.5
    assert Phase("nothing", 0.0, {}).limit is None


def test_the_parts_of_a_step_are_all_of_it():
    for setup in (SETUP, FULL, replace(FULL, on_cpu=True), replace(FULL, recompute_blocks=5, accumulation=3)):
        time = step_time(setup, DEVICES["h100"], 8, GPU)
        assert sum(time.parts.values()) == pytest.approx(time.seconds)
        flops = train_flops_per_token(setup.model, setup.seq_len) * time.tokens / setup.world_size
        peak = DEVICES["h100"].flops(setup.weight_bytes)
        assert time.mfu == pytest.approx(flops / peak / time.seconds)


def test_the_host_launches_what_is_counted():
    rates = replace(IDEAL, operator=1.0)
    found = phases(FULL, rates=rates)
    of_blocks, around = operators(FULL, "forward")
    assert found["forward"].launches == sum(of_blocks) + around
    assert found["head and loss"].launches == model_trace(FULL).around.work["head"].operators
    gradients = 2 + 24 * 10  # embedding, last norm, and the parameters of 24 layers
    of_blocks, around = operators(FULL, "backward")
    assert found["backward"].launches == sum(of_blocks) + around + gradients * 2 + ENGINE_OPERATORS
    assert phases(FULL, rates=replace(IDEAL, parameter=1.0))["backward"].launches == gradients
    twice = phases(replace(FULL, accumulation=2), rates=rates)
    assert twice["forward"].launches == 2 * found["forward"].launches
    assert twice["update"].launches == found["update"].launches


def test_losses_move_44_bytes_for_each_logit_and_compiled_6_in_calls_of_a_region():
    eager, compiled = (replace(FULL, compiled=asked) for asked in (False, True))
    of_each = [model_trace(setup).around.work["head"].bytes for setup in (eager, compiled)]
    logits = FULL.tokens * FULL.model.vocab_size
    assert of_each[0] - of_each[1] == pytest.approx((44 - 6) * logits, rel=1e-3)
    rates = replace(IDEAL, region=1.0)
    chunks = math.ceil(4 * logits / GPU_LOGITS)
    assert phases(compiled, rates=rates)["head and loss"].launches == pytest.approx(chunks)


def test_compiled_blocks_have_fewer_operators_and_calls_of_regions():
    compiled, rates = replace(FULL, compiled=True), replace(IDEAL, operator=1.0, region=1000.0)
    of_blocks, around = operators(FULL, "forward")
    launches = phases(compiled, rates=rates)["forward"].launches - around - 24 * 2 * 1000
    assert 0.6 * sum(of_blocks) < launches < 0.8 * sum(of_blocks)
    gated = replace(compiled, model=compiled.model.model_copy(update={"gated_mlp": True}), recompute_blocks=24)
    assert phases(gated, rates=replace(IDEAL, region=1.0))["backward"].launches == 2 * 24 * 3


def of_deepspeed(sums, wire, reduced, stage):
    """Operators of a micro-batch, how many more with a third layer, and bytes for each element of a gradient beyond the
    model's own, of a rank whose gradients are `reduced`, here over itself alone, or not."""
    found = []
    for layers, width in ((2, 256), (3, 512)):
        config = load_preset("tiny").model_copy(update={"num_hidden_layers": layers, "intermediate_size": width})
        ds = {**ds_config(1), **shipped("zero2"), "train_micro_batch_size_per_gpu": 1}
        ds |= {"data_types": {"grad_accum_dtype": sums}, "communication_data_type": wire}
        ds["zero_optimization"]["stage"] = stage
        train_step = build_train_step(config, recipe_of(ds))
        optimizer = train_step.engine.optimizer
        if reduced:
            optimizer.allreduce_and_scatter = partial(DeepSpeedZeroOptimizer.allreduce_and_scatter, optimizer)
        ids = Batch(*[torch.arange(64).unsqueeze(0)] * 2)
        for _ in range(2):
            whole = Operators()
            with whole:
                train_step.forward_backward([ids])
            train_step.update()
        plain = Decoder(config).to(next(train_step.model.parameters()).dtype)
        for router in plain.routers():
            router.selection_bias, router.running_load = router.selection_bias.float(), router.running_load.float()
        alone = Operators()
        with alone:
            plain(ids.input_ids, ids.labels).backward()
        elements = sum(one.numel() for one in plain.parameters())
        found.append((whole.calls.total(), whole.bytes - alone.bytes, elements))
    (few, small, some), (many, large, more) = found
    return few, many - few, (large - small) / (more - some)


@pytest.mark.parametrize(
    ("sums", "wire", "reduced", "stage"),
    [
        ("fp32", "fp32", True, 2),
        ("fp32", "bf16", True, 2),
        ("bf16", "bf16", True, 2),
        ("fp32", "fp32", False, 2),
        ("bf16", "bf16", False, 2),
        ("fp32", "fp32", False, 1),
    ],
)
def test_what_is_done_with_a_gradient_is_counted(sums, wire, reduced, stage):
    ((whole, more, moved),) = run_ranks(1, of_deepspeed, sums, wire, reduced, stage)
    apart, wide = sums == "fp32", wire == "fp32"
    tiny = load_preset("tiny").model_copy(update={"num_hidden_layers": 2})
    setup = replace(
        FULL, model=tiny, micro_batch=1, seq_len=64, sum_bytes=4 if apart else 2, communication_bytes=4 if wide else 2
    )
    setup = replace(setup, on_cpu=True, zero_stage=stage)
    of_phase = phases(setup, rates=replace(IDEAL, operator=1.0))
    planned = sum(of_phase[name].launches for name in ("forward", "head and loss", "backward"))
    if not reduced:
        assert whole == pytest.approx(planned, rel=0.015)
    of_block = sum(operators(setup, phase)[0][0] for phase in ("forward", "backward"))
    assert more == pytest.approx(of_block + 10 * gradient_operators(setup, reduced), abs=2)
    if stage == 1:
        assert moved == pytest.approx(gradient_bytes(setup, reduced, 1, 1) + 2, rel=0.01)  # what the zeros are like
        return
    # The dispatcher shows the target of a copy twice, the memory of a copy, and an all-reduce, which is counted apart.
    copies = 1 + reduced + (not apart)
    shown_too = 2 * copies + (0 if apart else 2) + reduced * (2 + 8 if wide else 4)
    assert moved == pytest.approx(gradient_bytes(setup, reduced, 1, 1) + shown_too, rel=0.01)


def test_an_offloaded_zero_1_gathers_gradients_once_in_a_step():
    offloaded = replace(FULL, offload=True)
    once = phases(offloaded)["backward"].device["copies"]
    for stage, times in ((1, 1), (2, 4)):
        setup = replace(offloaded, accumulation=4, zero_stage=stage)
        assert phases(setup)["backward"].device["copies"] == pytest.approx(times * once)
        host = phases(setup, rates=replace(IDEAL, parameter=1.0))["backward"].launches
        assert host == times * (2 + 24 * 10)


def test_an_update_takes_as_long_as_its_bytes():
    weights, rates = 679_809_792, replace(IDEAL, memory=1.0)
    assert phases(FULL, rates=rates)["update"].seconds == pytest.approx(46 * weights / 3.35e12, rel=1e-4)
    lion = replace(FULL, state_bytes=4)
    assert phases(lion, rates=rates)["update"].seconds == pytest.approx(38 * weights / 3.35e12, rel=1e-4)


def test_muon_adds_the_gemms_of_every_matrix():
    setup = replace(FULL, muon_bytes=4)
    layer = 2 * [(768, 768)] + 2 * [(256, 768)] + 16 * [(768, 2048)]  # attention; experts, either way round
    flops = 24 * sum(5 * 2 * (2 * small**2 * large + small**3) for small, large in layer)
    found = phases(setup, SLOW, replace(IDEAL, gemms=1.0))["update"].device["gemms"]
    assert found == pytest.approx(flops / SLOW.flops(2))
    assert phases(FULL, SLOW, replace(IDEAL, gemms=1.0))["update"].device["gemms"] == 0
    more = phases(setup, rates=replace(IDEAL, operator=1.0))["update"].launches - UPDATE_OPERATORS
    # Keys and values of all layers; queries and outputs, 2**24 values at a time; two stacks of each layer.
    assert more == MUON_OPERATORS * (1 + 2 + 2 * 24)


def test_muon_gives_the_device_what_is_counted_for_each_batch():
    update, counted = torch.randn(3 * 24), Operators()
    share = MatrixShare([(4, 6)] * 3, 72, 0, 1)
    with counted:
        orthogonalize_share(update, share, None, torch.bfloat16)
    assert counted.calls.total() == MUON_OPERATORS


def test_an_offloaded_optimizer_waits_for_the_host():
    setup = read_setup(load_preset("moe-680m"), recipe_of(shipped("zero2_offload")), 1, 1024, False)
    weights = 679_809_792
    update = phases(setup, rates=replace(IDEAL, links=0.5))["update"]
    assert update.device["transfers"] == pytest.approx((4 + 2) * weights / (64e9 * 0.5), rel=1e-4)
    assert update.device["optimizer"] == pytest.approx(46 * weights / 76.8e9, rel=1e-4)
    assert phases(FULL)["update"].device["transfers"] == 0


def test_recomputed_blocks_cost_their_forward_pass_again_up_to_what_was_kept_last_and_without_what_is_kept():
    half = replace(FULL, recompute_blocks=12)
    plain, again, selective = phases(FULL), phases(half), phases(replace(half, recompute="selective"))
    for part, least, kept in (("gemms", 0.98, 0.3), ("attention", 0.98, 1), ("memory", 0.9, 0)):
        once = plain["forward"].device[part] / 2
        more = again["backward"].device[part] - plain["backward"].device[part]
        assert least * once < more < 1.001 * once, part
        saved = again["backward"].device[part] - selective["backward"].device[part]
        assert saved == pytest.approx(kept * more, rel=0.2, abs=5e-5), part
    assert again["forward"] == selective["forward"] == plain["forward"]


def test_rows_travel_behind_the_shared_experts_and_not_behind_the_others():
    shared = replace(SETUP, model=SETUP.model.model_copy(update={"n_shared_experts": 1}))
    for setup, is_hidden in ((shared, True), (SETUP, False), (replace(shared, on_cpu=True), False)):
        for phase in ("forward", "backward"):
            ways = [one for one in collectives(setup) if one.phase == phase]
            rows = [one.seconds(SLOW, 8, 1.0) for one in ways if one.purpose == f"rows to experts, {phase}"]
            exchange = [
                phases(setup, SLOW, replace(IDEAL, gemms=gemms))[phase].device["exchange"] for gemms in (math.inf, 1e-9)
            ]
            assert exchange[0] == pytest.approx(sum(one.seconds(SLOW, 8, 1.0) for one in ways))
            assert exchange[0] - exchange[1] == pytest.approx(is_hidden * sum(rows))


def test_the_host_waits_once_for_rows_and_for_each_looped_gemm():
    rates = replace(IDEAL, wait=1.0)
    waits = [
        phases(replace(FULL, world_size=8, ep_size=ep_size, kernel=kernel), rates=rates)["forward"].waits
        for ep_size, kernel in ((1, "grouped_mm"), (8, "grouped_mm"), (1, "loop"), (8, "loop"))
    ]
    assert waits == [0, 24, 48, 72]


UNLIKE = ModelConfig(
    **{**PRESET, "num_hidden_layers": 4, "num_latent_tokens": 0, "first_k_dense_replace": 1, "n_shared_experts": 1,
       "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "sliding_window": 7,
       "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]}
)  # fmt: skip


def test_blocks_that_differ_are_counted_one_by_one():
    setup, rates = replace(SETUP, model=UNLIKE), replace(IDEAL, operator=1.0)
    found = phases(setup, rates=rates)
    of_blocks, around = operators(setup, "forward")
    dense, sliding, full, same, of_multi_token = of_blocks
    assert dense < full < sliding
    assert full == same == of_multi_token
    assert found["forward"].launches == sum(of_blocks) + around
    without = replace(setup, model=UNLIKE.model_copy(update={"num_nextn_predict_layers": 0}))
    assert found["head and loss"].launches > 1.5 * phases(without, rates=rates)["head and loss"].launches
    waits = phases(setup, rates=replace(IDEAL, wait=1.0))["forward"].waits
    assert waits == 4  # three sparse blocks and that of multi-token prediction
    again = phases(replace(setup, recompute_blocks=2), rates=rates)["backward"].launches - found["backward"].launches
    assert 0.9 * (dense + sliding) < again < dense + sliding  # without what follows the last that was kept
