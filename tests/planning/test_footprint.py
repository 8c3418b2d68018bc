"""Predicted bytes and payloads against a real engine's step, measured operation by operation."""

from collections import Counter
from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
import torch
from devices import on_gpus
from model_parts import PARTS
from model_parts import SHAPE as PARTS_SHAPE
from ranks import run_new_ranks, run_ranks, this_device
from toy import PRESET, SHIPPED

from megamoe.config import ModelConfig, load_preset
from megamoe.json_files import read_json
from megamoe.model import products
from megamoe.planning.expert_layer import expert_bytes
from megamoe.planning.footprint import footprint
from megamoe.planning.sharding import parameter_groups, read_setup
from megamoe.planning.simulate import measure
from megamoe.planning.traffic import collectives

# Every token goes to every expert: how many rows travel does not depend on the routing.
ALL = {**PRESET, "num_experts_per_tok": PRESET["num_local_experts"]}
# (shape, micro-batch, tokens per sample), by what most of the bytes belong to.
WEIGHTS = {**ALL, "vocab_size": 1000, "hidden_size": 96, "intermediate_size": 512}, 1, 8
ACTIVATIONS = {**ALL, "vocab_size": 16, "max_position_embeddings": 256}, 2, 256
EMBEDDING = {**ALL, "vocab_size": 20_000, "num_hidden_layers": 1}, 1, 8
LOGITS = {**EMBEDDING[0], "max_position_embeddings": 1301}, 1, 1301  # two chunks, one of them a token longer
# A dense block and seven experts, gated: half of the shared and of the experts' matrices end within one.
UNEVEN = (
    {**WEIGHTS[0], "num_local_experts": 7, "num_experts_per_tok": 7, "first_k_dense_replace": 1, "gated_mlp": True},
    *WEIGHTS[1:],
)
SPARSE = {**PRESET, "num_local_experts": 8, "num_hidden_layers": 4, "max_position_embeddings": 512}, 2, 512


def config(name, bucket=200_000, accumulation=1, **zero):
    """A shipped DeepSpeed JSON with buckets that a small model fills, some more than once."""
    ds = read_json(SHIPPED / f"{name}.json")
    ds["zero_optimization"].update(reduce_bucket_size=bucket, **zero)
    ds["gradient_accumulation_steps"] = accumulation
    return ds


def case(shape, ds, ep_size=1, recompute_blocks=0, ema_decay=None):
    """What is measured on every rank, and predicted: the shape's micro-batch goes into the JSON."""
    model, micro_batch, seq_len = shape
    ds = {**ds, "train_micro_batch_size_per_gpu": micro_batch}
    return ModelConfig(**model), ds, ep_size, seq_len, recompute_blocks, ema_decay


RECIPES = {
    "bf16, fp32 sums": config("zero2"),
    "bf16, one bucket": config("zero2", 1_000_000, overlap_comm=False),
    "bf16, bf16 sums": config("tiny"),
    "fp32": config("zero2_fp32"),
    "ZeRO-1": config("zero1"),
    "ZeRO-1, no overlap": config("zero1", overlap_comm=False),
    "bf16 on the wire": {**config("zero2"), "communication_data_type": "bf16"},
    "reduced to each": config("zero2", use_multi_rank_bucket_allreduce=False),
    "offload": config("zero2_offload"),
    "Lion, offload": config("zero2_lion"),
    "Muon": config("zero2_muon"),
    "Muon, bf16 sums": {**config("tiny"), "optimizer": config("zero2_muon")["optimizer"]},
}
BELOW_A_STACK = {
    f"bucket below a stack, {name}": config(ds, 100_000, **zero)
    for name, ds, zero in (
        ("ZeRO-2", "zero2", {}),
        ("ZeRO-2, no overlap", "zero2", {"overlap_comm": False}),
        ("bf16 sums", "tiny", {}),
        ("ZeRO-1", "zero1", {}),
        ("ZeRO-1, no overlap", "zero1", {"overlap_comm": False}),
        ("reduced to each", "zero2", {"use_multi_rank_bucket_allreduce": False}),
        ("offload", "zero2_offload", {}),
        ("offload, accumulated", "zero2_offload", {"accumulation": 2}),
        ("accumulated", "zero2", {"accumulation": 2}),
        ("ZeRO-1, accumulated", "zero1", {"accumulation": 2}),
    )
}
OFFLOAD_BF16 = {**config("zero2_offload"), "data_types": {}}
ACCUMULATED = {
    "zero2, accumulated": config("zero2", accumulation=2),
    "tiny, accumulated": config("tiny", accumulation=2),
    "zero1, accumulated": config("zero1", accumulation=3),
    "offload, accumulated": config("zero2_offload", accumulation=2),
    "offload, bf16 sums, accumulated": {**OFFLOAD_BF16, "gradient_accumulation_steps": 3},
    "offload, ZeRO-1, accumulated": {**config("zero2_offload", accumulation=3, stage=1), "data_types": {}},
}
DEEP = {**ACTIVATIONS[0], "num_hidden_layers": 6}, *ACTIVATIONS[1:]
OTHER_MODELS = {
    "all": {"expert_dropout": 0.1, "router_jitter_noise": 0.01, "router_score": "sigmoid"},
    "none": {"num_latent_tokens": 0},
    "gated": {"gated_mlp": True, "hidden_act": "gelu", "intermediate_size": 128},
    "ReLU": {"hidden_act": "relu", "intermediate_size": 256},
}
RECIPES_ON_ONE = {f"{name}, weights": case(WEIGHTS, ds) for name, ds in (RECIPES | BELOW_A_STACK | ACCUMULATED).items()}
SHAPES_ON_ONE = {
    **{f"{name}, activations": case(ACTIVATIONS, ds) for name, ds in list(RECIPES.items())[::3]},
    **{name: case(({**ACTIVATIONS[0], **change}, *ACTIVATIONS[1:]), config("zero2"))
       for name, change in OTHER_MODELS.items()},
    "routing that differs": case(SPARSE, config("zero2")),
    "quantile": case(({**SPARSE[0], "router_bias_rule": "quantile"}, *SPARSE[1:]), config("zero2")),
    "embedding": case(EMBEDDING, config("zero2")),
    "embedding, fp32": case(EMBEDDING, config("zero2_fp32")),
    "embedding, offload": case(EMBEDDING, config("zero2_offload")),
    "embedding, offload, bf16 sums": case(EMBEDDING, OFFLOAD_BF16),
    "logits": case(LOGITS, config("zero2", 1_000_000)),
    "recomputed": case(DEEP, config("zero2"), recompute_blocks=4),
}  # fmt: skip
ON_TWO = {
    **{f"{name}, ep_size 1": case(WEIGHTS, RECIPES[name])
       for name in ("bf16, fp32 sums", "bf16, bf16 sums", "fp32", "ZeRO-1", "offload", "Lion, offload")},
    **{f"{name}, ep_size 2": case(WEIGHTS, RECIPES[name], ep_size=2)
       for name in (
           "bf16, fp32 sums", "bf16, bf16 sums", "reduced to each", "bf16 on the wire", "offload", "Lion, offload")},
    "offload, bf16 sums, accumulated": case(WEIGHTS, ACCUMULATED["offload, bf16 sums, accumulated"], ep_size=2),
    "Muon, ep_size 2": case(WEIGHTS, RECIPES["Muon"], ep_size=2),
    "Muon, cut": case(UNEVEN, RECIPES["Muon"]),
    **{name: case(WEIGHTS, ds) for name, ds in BELOW_A_STACK.items()},
    **{f"activations, ep_size {ep_size}": case(ACTIVATIONS, config("zero2"), ep_size) for ep_size in (1, 2)},
    "recomputed": case(DEEP, config("zero2"), ep_size=2, recompute_blocks=4),
    "averaged weights": case(WEIGHTS, RECIPES["bf16, fp32 sums"], ep_size=2, ema_decay=0.9),
    **{f"{name}, ep_size 2": case(({**ACTIVATIONS[0], **change, "expert_dropout": 0.1}, *ACTIVATIONS[1:]),
                                  config("zero2"), ep_size=2)
       for name, change in OTHER_MODELS.items()},
}  # fmt: skip


def with_part(part):
    """A shape with one of PARTS, mostly of activations; as many rows travel whatever the routing."""
    shape = {**PARTS_SHAPE, "vocab_size": 16, "hidden_size": 64, "max_position_embeddings": 256}
    shape["num_experts_per_tok"] = 4 if "topk_group" in PARTS[part] else 8  # all that may be chosen
    return {**shape, "head_dim": 32, **PARTS[part]}, 2, 256


PARTS_ON_ONE = {
    **{name: case(with_part(name), config("zero2")) for name in PARTS},
    "dense_layers, recomputed": case(with_part("dense_layers"), config("zero2"), recompute_blocks=1),
    "untied_multi_token, fp32": case(with_part("untied_multi_token"), config("zero2_fp32")),
}
# With groups, how many rows each rank sends depends on the routing.
PARTS_ON_TWO = {
    name: case(with_part(name), config("zero2"), ep_size=2) for name in PARTS if "topk_group" not in PARTS[name]
}
ON_FOUR = {"bf16, fp32 sums": case(WEIGHTS, RECIPES["bf16, fp32 sums"], ep_size=2)}
# Cases that are measured together, in one group of so many ranks.
GROUPS = (
    (1, RECIPES_ON_ONE), (1, SHAPES_ON_ONE), (2, ON_TWO), (4, ON_FOUR), (1, PARTS_ON_ONE), (2, PARTS_ON_TWO)
)  # fmt: skip
CASES = [(group, name) for group, (_, cases) in enumerate(GROUPS) for name in cases]
IDS = [f"{name}, {GROUPS[group][0]} ranks" for group, name in CASES]


def measure_all(cases):
    return {name: measure(*values) for name, values in cases.items()}


@cache
def measured(group):
    """What every rank measured, by name of the case."""
    return run_ranks(GROUPS[group][0], measure_all, GROUPS[group][1])


def setup_of(group, name):
    ranks, cases = GROUPS[group]
    model, ds, ep_size, seq_len, recompute_blocks, ema_decay = cases[name]
    averages = ema_decay is not None
    return read_setup(model, ds, ranks, ep_size, seq_len, True, recompute_blocks, averages=averages)


def held_by_gloo(setup, peak):
    """Its thread lets go of the tensors of a collective a little later: now and then too late for the peak."""
    largest = max(size for group in parameter_groups(setup) for size in group.sizes.values())
    wire = (
        setup.communication_bytes * max(largest, setup.bucket) if setup.communication_bytes > setup.weight_bytes else 0
    )
    return wire + (2 * expert_bytes(setup).result if setup.ep_size > 1 else 0.02 * peak)


@pytest.mark.parametrize(("group", "name"), CASES, ids=IDS)
def test_predicted_bytes_and_payload_are_those_of_a_real_step(group, name):
    setup = setup_of(group, name)
    payload = Counter()
    for one in collectives(setup):
        payload[one.kind, one.ranks] += one.payload
    off = 0.015 if setup.world_size == 1 and not setup.recompute_blocks else 0.03  # what garbage is left differs
    for rank, found in enumerate(measured(group)):
        real, predicted = found[name], footprint(setup, rank)
        assert predicted.between.total() == pytest.approx(real.between, rel=0.005), rank
        late = 0 if setup.world_size == 1 else held_by_gloo(setup, real.peak)
        assert real.peak - late <= predicted.peak.total() * 1.01, rank
        assert real.forward - late <= predicted.forward.total() * (1 + off), rank
        assert predicted.peak.total() <= real.peak * 1.01, rank
        assert predicted.forward.total() <= real.forward * (1 + off), rank
        assert payload == real.payload, rank


def measure_with_a_loop(values):
    """With the products of GPUs for which neither torch nor DeepSpeed has one kernel."""
    with mock.patch.object(products, "kernel_for", return_value="loop"):
        return measure(*values)


def test_a_loop_over_the_experts_joins_the_gradients_of_each():
    layer = {**ALL, "vocab_size": 16, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1}, 1, 8
    values = case(layer, config("zero2_fp32"))
    (real,) = run_ranks(1, measure_with_a_loop, values)
    model, ds, ep_size, seq_len, *_ = values
    setup = read_setup(model, ds, 1, ep_size, seq_len, True, kernel="loop")
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
    model, ds = load_preset(preset), config("zero2", bucket)
    seq_len = model.max_position_embeddings
    (real,) = run_new_ranks(1, peak_of_a_step, model, ds, 1, seq_len, device=device)
    kernel = products.kernel_for(torch.device(device), torch.bfloat16)
    planned = footprint(read_setup(model, ds, 1, 1, seq_len, device == "cpu", kernel=kernel)).peak.total()
    record_property("planned GiB", round(planned / 2**30, 2))
    record_property("measured GiB", round(real / 2**30, 2))
    assert planned == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(("group", "name"), CASES, ids=IDS)
def test_the_shapes_are_made_mostly_of_what_they_are_named_for(group, name):
    peak, (model, *_) = footprint(setup_of(group, name)).peak, GROUPS[group][1][name]
    states = ("weights", "fp32 masters", "optimizer state", "gradient partition", "fp32 gradients")
    if model == ModelConfig(**ACTIVATIONS[0]):
        assert peak["activations"] > peak.total() / 2
    elif model == ModelConfig(**WEIGHTS[0]):
        assert sum(peak[kind] for kind in states) > peak.total() / 2
    elif model == ModelConfig(**LOGITS[0]):
        assert peak["loss chunk"] > peak.total() / 2


def test_a_large_vocabulary_moves_the_peak():
    embedding, logits = footprint(setup_of(1, "embedding")), footprint(setup_of(1, "logits"))
    assert embedding.peak == embedding.backward
    assert logits.peak == logits.forward


def test_recomputed_blocks_keep_fewer_activations():
    for group in (1, 2):
        setup = setup_of(group, "recomputed")
        stored, recomputed = (footprint(one).peak for one in (replace(setup, recompute_blocks=0), setup))
        assert recomputed["activations"] < stored["activations"] / 2


MUON_CASES = [(0, "Muon, weights"), (0, "Muon, bf16 sums, weights"), (2, "Muon, cut"), (2, "Muon, ep_size 2")]


@pytest.mark.parametrize(("group", "name"), MUON_CASES)
def test_a_step_of_muon_takes_the_planned_bytes(group, name):
    setup = setup_of(group, name)
    for rank, found in enumerate(measured(group)):
        planned = footprint(setup, rank)
        real, bucket = found[name].step, setup.bucket * setup.weight_bytes
        late = 0 if setup.world_size == 1 else held_by_gloo(setup, real) + bucket
        assert planned.step.total() <= real * 1.002, rank
        assert real - late <= planned.step.total() * 1.002, rank
        without = replace(setup, muon_bytes=None)
        assert planned.between["optimizer state"] < 0.6 * footprint(without, rank).between["optimizer state"]
    moved = [one.purpose for one in collectives(setup) if "cut by" in one.purpose]
    assert len(moved) == (2 if "cut" in name else 0)


def test_a_moment_less_is_all_that_tells_lion_from_adamw():
    adamw, lion = (measured(0)[0][f"{name}, weights"] for name in ("offload", "Lion, offload"))
    masters = footprint(setup_of(0, "offload, weights")).between["fp32 masters"]
    for one, other in ((adamw.between, lion.between), (adamw.peak, lion.peak)):
        assert one - other == pytest.approx(masters, rel=1e-3)  # some bytes of garbage may be left
