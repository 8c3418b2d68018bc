"""Predicted bytes and payloads against a real engine's step, measured operation by operation."""

import gc
import math
from dataclasses import replace
from functools import cache
from unittest import mock

import engines
import pytest
import simulate
import torch
from devices import on_gpus
from model_parts import PARTS
from model_parts import SHAPE as PARTS_SHAPE
from ranks import run_alone, run_new_ranks, run_ranks
from safetensors.torch import load_file
from simulate import measure, one_rank_of, payload_of
from toy import PRESET, ds_config, recipe_of, shipped

from megamoe.config.model import ModelConfig, load_preset
from megamoe.launch.distributed import this_device
from megamoe.model import grouped_gemm
from megamoe.planning.footprint import footprint
from megamoe.planning.rates import GPU
from megamoe.planning.sharding import parameter_groups, read_setup
from megamoe.planning.step_time import step_time
from megamoe.planning.traffic import collectives
from megamoe.training.step import build_train_step
from megamoe.utils.data_sheets import DEVICES

# Every token goes to every expert: how many rows travel does not depend on the routing.
ALL = {**PRESET, "num_experts_per_tok": PRESET["num_local_experts"]}
# (shape, micro-batch, tokens per sample), by what most of the bytes belong to.
WEIGHTS = {**ALL, "vocab_size": 1000, "hidden_size": 96, "intermediate_size": 512}, 1, 8
ACTIVATIONS = {**ALL, "vocab_size": 16, "max_position_embeddings": 256}, 2, 256
EMBEDDING = {**ALL, "vocab_size": 20_000, "num_hidden_layers": 1}, 1, 8
# Two chunks, one of them a token longer.
LOGITS = {**EMBEDDING[0], "hidden_size": 16, "max_position_embeddings": 1301}, 1, 1301
# A dense block and seven experts, gated: half of the shared and of the experts' matrices end within one.
UNEVEN = (
    {**WEIGHTS[0], "num_local_experts": 7, "num_experts_per_tok": 7, "first_k_dense_replace": 1, "gated_mlp": True},
    *WEIGHTS[1:],
)
SPARSE = {**PRESET, "num_local_experts": 8, "num_hidden_layers": 4, "max_position_embeddings": 512}, 2, 512


def config(name, bucket=200_000, accumulation=1, **zero):
    """A shipped DeepSpeed JSON with buckets that a small model fills, some more than once."""
    ds = shipped(name)
    ds["zero_optimization"].update(reduce_bucket_size=bucket, **zero)
    ds["gradient_accumulation_steps"] = accumulation
    return ds


def case(shape, ds, ep_size=1, recompute_blocks=0, ema_decay=None, recompute="whole"):
    """What is measured on every rank, and predicted: the shape's micro-batch goes into the JSON."""
    model, micro_batch, seq_len = shape
    ds = {**ds, "train_micro_batch_size_per_gpu": micro_batch}
    return ModelConfig(**model), recipe_of(ds), ep_size, seq_len, recompute_blocks, ema_decay, recompute


OFFLOAD = config("zero2_offload")
OFFLOAD_BF16 = {**OFFLOAD, "data_types": {}}
DEEP = {**ACTIVATIONS[0], "num_hidden_layers": 6}, *ACTIVATIONS[1:]
ALL_OF_IT = {"expert_dropout": 0.1, "router_jitter_noise": 0.01, "router_score": "sigmoid"}


def activations(**changes):
    return {**ACTIVATIONS[0], **changes}, *ACTIVATIONS[1:]


def with_part(part):
    """A shape with one of PARTS, mostly of activations; as many rows travel whatever the routing."""
    shape = {**PARTS_SHAPE, "vocab_size": 16, "hidden_size": 64, "max_position_embeddings": 256}
    shape["num_experts_per_tok"] = 4 if "topk_group" in PARTS[part] else 8  # all that may be chosen
    return {**shape, "head_dim": 32, **PARTS[part]}, 2, 256


# What is traced of each part is compared in test_model_trace.py; these are those that keep most by themselves.
PARTS_ON_ONE = "sigmoid_groups", "sliding_multi_token", "compressed_queries"
ON_ONE = {
    "bf16, fp32 sums": case(WEIGHTS, config("zero2")),
    "bf16 sums, accumulated": case(WEIGHTS, config("tiny", accumulation=2)),
    "reduced to each": case(WEIGHTS, config("zero2", use_multi_rank_bucket_allreduce=False)),
    "bucket below a stack, no overlap": case(WEIGHTS, config("zero2", 100_000, overlap_comm=False)),
    "ZeRO-1, no overlap, accumulated": case(WEIGHTS, config("zero1", 100_000, 2, overlap_comm=False)),
    "bucket below a stack, offload, accumulated": case(WEIGHTS, config("zero2_offload", 100_000, 2)),
    "offload": case(WEIGHTS, OFFLOAD),
    "offload, ZeRO-1, bf16 sums, accumulated": case(
        WEIGHTS, {**config("zero2_offload", accumulation=3, stage=1), "data_types": {}}
    ),
    "Lion, offload": case(WEIGHTS, config("zero2_lion")),
    "Muon": case(WEIGHTS, config("zero2_muon")),
    "fp32, activations": case(ACTIVATIONS, config("zero2_fp32")),
    "Lion, offload, activations": case(ACTIVATIONS, config("zero2_lion")),
    "dropout, jitter, sigmoid": case(activations(**ALL_OF_IT), config("zero2")),
    "quantile, routing that differs": case(
        ({**SPARSE[0], "router_bias_rule": "quantile"}, *SPARSE[1:]), config("zero2")
    ),
    "embedding": case(EMBEDDING, config("zero2")),
    "embedding, fp32": case(EMBEDDING, config("zero2_fp32")),
    "embedding, offload, bf16 sums": case(EMBEDDING, OFFLOAD_BF16),
    "logits": case(LOGITS, config("zero2", 1_000_000)),
    "recomputed": case(DEEP, config("zero2"), recompute_blocks=4),
    "selectively": case(DEEP, config("zero2"), recompute_blocks=4, recompute="selective"),
    "untied_multi_token, fp32": case(with_part("untied_multi_token"), config("zero2_fp32")),
    **{name: case(with_part(name), config("zero2")) for name in PARTS_ON_ONE},
}
ON_TWO = {
    "bf16, fp32 sums, ep_size 1": case(WEIGHTS, config("zero2")),
    "bf16 on the wire": case(WEIGHTS, {**config("zero2"), "communication_data_type": "bf16"}, ep_size=2),
    "bucket below a stack, uneven": case(UNEVEN, config("zero2", 100_000)),
    "ZeRO-1, accumulated": case(WEIGHTS, config("zero1", accumulation=3)),
    "ZeRO-1, bf16 on the wire, ep_size 2": case(
        WEIGHTS, {**config("zero1", accumulation=2), "communication_data_type": "bf16"}, ep_size=2
    ),
    "ZeRO-1, bf16 sums": case(WEIGHTS, {**config("zero1", 100_000), "data_types": {}}),
    "offload, bf16 sums, accumulated": case(WEIGHTS, {**OFFLOAD_BF16, "gradient_accumulation_steps": 3}, ep_size=2),
    "Muon, ep_size 2": case(WEIGHTS, config("zero2_muon"), ep_size=2),
    "Muon, cut": case(UNEVEN, config("zero2_muon")),
    "averaged weights": case(WEIGHTS, config("zero2"), ep_size=2, ema_decay=0.9),
    "recomputed": case(DEEP, config("zero2"), ep_size=2, recompute_blocks=4),
    "selectively": case(DEEP, config("zero2"), ep_size=2, recompute_blocks=4, recompute="selective"),
    "gated GELU": case(
        activations(gated_mlp=True, hidden_act="gelu", intermediate_size=128, expert_dropout=0.1),
        config("zero2"),
        ep_size=2,
    ),
    "untied_multi_token": case(with_part("untied_multi_token"), config("zero2"), ep_size=2),
}
ON_FOUR = {"bf16, fp32 sums": case(WEIGHTS, config("zero2"), ep_size=2)}
ON_RANKS = {1: ON_ONE, 2: ON_TWO, 4: ON_FOUR}
CASES = [(ranks, name) for ranks, cases in ON_RANKS.items() for name in cases]


def measure_each(cases):
    with one_rank_of(1):
        found = {}
        for name, values in cases.items():
            found[name] = measure(*values)
            gc.collect()  # engines are full of cycles
        return found


@cache
def measured_without_gloo():
    """What a rank measures that is alone and reduces all the same: gloo's thread would let go of what it reduces a
    little later, now and then too late for the peak."""
    return run_alone(measure_each, {name: values for name, values in ON_ONE.items() if setup_of(1, name).reduces(1)})


@cache
def measured(ranks, name):
    """What every rank measured."""
    if ranks == 1 and setup_of(1, name).reduces(1):
        return [measured_without_gloo()[name]]
    return run_ranks(ranks, measure, *ON_RANKS[ranks][name])


def setup_of(ranks, name):
    model, recipe, ep_size, seq_len, recompute_blocks, ema_decay, recompute = ON_RANKS[ranks][name]
    averages = ema_decay is not None
    recipe = replace(recipe, world_size=ranks)
    setup = read_setup(model, recipe, ep_size, seq_len, True, averages)
    return replace(setup, recompute_blocks=recompute_blocks, recompute=recompute)


def held_by_gloo(setup, peak):
    """Its thread lets go of the tensors of a collective a little later: now and then too late for the peak."""
    largest = max(size for group in parameter_groups(setup) for size in group.sizes.values())
    wire = (
        setup.communication_bytes * max(largest, setup.bucket) if setup.communication_bytes > setup.weight_bytes else 0
    )
    rows = setup.weight_bytes * setup.places * setup.model.hidden_size
    return wire + (2 * rows if setup.ep_size > 1 else 0.02 * peak)


def measure_with_all_rows_at_rank_0(*values):
    def build(*args, **options):
        train_step = build_train_step(*args, **options)
        for router in train_step.model.routers():
            router.selection_bias[: router.selection_bias.numel() // 2] += 100
        return train_step

    with mock.patch.object(simulate, "build_train_step", build):
        return measure(*values)


def test_the_fullest_rank_has_the_memory_of_its_imbalance():
    model, recipe, ep_size, seq_len, *_ = values = case(SPARSE, config("zero2"), ep_size=2)
    fullest, _ = run_ranks(2, measure_with_all_rows_at_rank_0, *values)
    setup = read_setup(model, replace(recipe, world_size=2), ep_size, seq_len, True)
    balanced, skewed = (footprint(replace(setup, imbalance=one)).peak.total() for one in (1.0, 2.0))
    assert fullest.peak > 1.2 * balanced
    assert fullest.peak == pytest.approx(skewed, rel=0.03)
    assert footprint(replace(setup, imbalance=math.inf)).peak.total() == skewed  # two ranks have no more rows
    alone = replace(setup, ep_size=1)
    assert footprint(replace(alone, imbalance=2.0)) == footprint(alone)
    assert step_time(replace(setup, imbalance=2.0), DEVICES["h100"], 8, GPU) == step_time(
        setup, DEVICES["h100"], 8, GPU
    )


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_predicted_bytes_and_payload_are_those_of_a_real_step(ranks, name):
    setup = setup_of(ranks, name)
    payload = payload_of(setup)
    off = 0.015 if setup.world_size == 1 and not setup.recompute_blocks else 0.03  # what garbage is left differs
    for rank, real in enumerate(measured(ranks, name)):
        predicted = footprint(setup, rank)
        assert predicted.between.total() == pytest.approx(real.between, rel=0.005), rank
        late = 0 if setup.world_size == 1 else held_by_gloo(setup, real.peak)
        assert real.peak - late <= predicted.peak.total() * 1.01, rank
        assert real.forward - late <= predicted.forward.total() * (1 + off), rank
        assert predicted.peak.total() <= real.peak * 1.01, rank
        assert predicted.forward.total() <= real.forward * (1 + off), rank
        assert payload == real.payload, rank


def measure_with_a_loop(values):
    """With the GEMMs of GPUs for which neither torch nor DeepSpeed has one kernel."""
    with mock.patch.object(grouped_gemm, "kernel_for", return_value="loop"):
        return measure(*values)


def test_a_loop_over_the_experts_joins_the_gradients_of_each():
    layer = {**ALL, "vocab_size": 16, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1}, 1, 8
    values = case(layer, config("zero2_fp32"))
    (real,) = run_ranks(1, measure_with_a_loop, values)
    model, recipe, ep_size, seq_len, *_ = values
    setup = replace(read_setup(model, recipe, ep_size, seq_len, True), kernel="loop")
    assert footprint(setup).peak.total() == pytest.approx(real.peak, rel=0.002)
    assert footprint(setup).peak.total() > 1.02 * footprint(replace(setup, kernel="grouped_mm")).peak.total()


def peak_of_a_step(*values):
    """Bytes of live tensors; on a GPU, those that its allocator has handed out."""
    real = measure(*values)
    return real.peak if this_device().type == "cpu" else torch.cuda.max_memory_allocated()


# The shipped buckets would be most of what `tiny` takes.
@pytest.mark.parametrize(
    ("device", "preset", "bucket"), [("cpu", "tiny", 200_000), on_gpus(1, "cuda", "moe-680m", 50_000_000)]
)
def test_a_step_of_a_shipped_preset_takes_the_planned_memory_to_5_percent(device, preset, bucket, record_property):
    model, recipe = load_preset(preset), recipe_of(config("zero2", bucket))
    seq_len = model.max_position_embeddings
    (real,) = run_new_ranks(1, peak_of_a_step, model, recipe, 1, seq_len, device=device)
    kernel = grouped_gemm.kernel_for(torch.device(device), torch.bfloat16)
    setup = read_setup(model, recipe, 1, seq_len, device == "cpu")
    planned = footprint(replace(setup, kernel=kernel)).peak.total()
    record_property("planned GiB", round(planned / 2**30, 2))
    record_property("measured GiB", round(real / 2**30, 2))
    assert planned == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(("ranks", "name"), [(1, "Muon"), (2, "Muon, cut"), (2, "Muon, ep_size 2")])
def test_a_step_of_muon_takes_the_planned_bytes(ranks, name):
    setup = setup_of(ranks, name)
    for rank, found in enumerate(measured(ranks, name)):
        planned = footprint(setup, rank)
        real, bucket = found.step, setup.bucket * setup.weight_bytes
        late = 0 if setup.world_size == 1 else held_by_gloo(setup, real) + bucket
        assert planned.step.total() <= real * 1.002, rank
        assert real - late <= planned.step.total() * 1.002, rank
        without = replace(setup, muon_bytes=None)
        assert planned.between["optimizer state"] < 0.6 * footprint(without, rank).between["optimizer state"], rank
    moved = [one.purpose for one in collectives(setup) if "cut matrices" in one.purpose]
    assert len(moved) == (2 if "cut" in name else 0)


def save(folder, optimizer):
    engine = engines.make(2, **optimizer)
    engines.train(engine, 1)
    engines.save(engine, folder, 1)


@pytest.mark.parametrize("name", ["zero2_fp32", "zero2_muon"])
def test_a_checkpoint_has_the_bytes_that_are_planned(name, tmp_path):
    optimizer = {"optimizer": shipped(name)["optimizer"]}
    run_ranks(2, save, tmp_path, optimizer)
    tensors = [one for file in tmp_path.rglob("*.safetensors") for one in load_file(file).values()]
    setup = read_setup(engines.CONFIG, recipe_of(ds_config(4, **optimizer), 2), 2, 16, True)
    assert 2 * footprint(setup).saved == pytest.approx(sum(one.nbytes for one in tensors), rel=0.01)
