"""Predicted bytes and payloads against a real engine's step, seen operation by operation."""

import pytest
from ranks import run_ranks
from toy import PRESET, SHIPPED

from megamoe.config import ModelConfig, read_json
from megamoe.planning.footprint import footprint
from megamoe.planning.sharding import read_setup
from megamoe.planning.simulate import measure
from megamoe.planning.traffic import collectives

# Every token goes to every expert: how many rows travel does not depend on the routing.
ALL = {**PRESET, "num_experts_per_tok": PRESET["num_local_experts"]}
# (shape, micro-batch, tokens per sample), by what most of the bytes belong to.
WEIGHTS = {**ALL, "vocab_size": 1000, "hidden_size": 96, "intermediate_size": 512}, 1, 8
ACTIVATIONS = {**ALL, "vocab_size": 16, "max_position_embeddings": 256}, 2, 256
EMBEDDING = {**ALL, "vocab_size": 20_000, "num_hidden_layers": 1}, 1, 8
LOGITS = {**EMBEDDING[0], "max_position_embeddings": 600}, 1, 600  # a chunk and a part of one
SPARSE = {**PRESET, "num_local_experts": 8, "num_hidden_layers": 4, "max_position_embeddings": 512}, 2, 512


def config(name, bucket=200_000, accumulation=1, **zero):
    """A shipped DeepSpeed JSON with buckets that a small model fills, some more than once."""
    ds = read_json(SHIPPED / f"{name}.json")
    ds["zero_optimization"].update(reduce_bucket_size=bucket, **zero)
    ds["gradient_accumulation_steps"] = accumulation
    return ds


def measured(cases, ep_size, recompute_blocks):
    """On every rank: (shape, JSON) by name -> Measured by name."""
    found = {}
    for name, ((model, micro_batch, seq_len), ds) in cases.items():
        ds["train_micro_batch_size_per_gpu"] = micro_batch
        found[name] = measure(ModelConfig(**model), ds, ep_size, seq_len, recompute_blocks)
    return found


def check(cases, world_size, ep_size, off=0.015, recompute_blocks=0):
    """Compare on every rank; returns the predicted footprints of rank 0 by name.

    `off` is the largest relative error of the forward pass.
    """
    footprints = {}
    for rank, found in enumerate(run_ranks(world_size, measured, cases, ep_size, recompute_blocks)):
        for name, seen in found.items():
            (model, micro_batch, seq_len), ds = cases[name]
            ds["train_micro_batch_size_per_gpu"] = micro_batch
            setup = read_setup(ModelConfig(**model), ds, world_size, ep_size, seq_len, True, recompute_blocks)
            predicted = footprint(setup, rank)
            where = f"{name}, rank {rank} of {world_size}, ep_size {ep_size}"
            assert predicted.between.total() == pytest.approx(seen.between, rel=0.005), where
            assert predicted.peak.total() == pytest.approx(seen.peak, rel=0.02), where
            assert predicted.forward.total() == pytest.approx(seen.forward, rel=off), where
            payload = {}
            for one in collectives(setup):
                payload[one.kind, one.ranks] = payload.get((one.kind, one.ranks), 0) + one.payload
            assert payload == dict(seen.payload), where
            if rank == 0:
                footprints[name] = predicted
    return footprints


RECIPES = {
    "bf16, fp32 sums": config("zero2"),
    "bf16, one bucket": config("zero2", 1_000_000, overlap_comm=False),
    "bf16, bf16 sums": config("tiny"),
    "fp32": config("zero2_fp32"),
    "ZeRO-1": config("zero1"),
    "ZeRO-1, no overlap": config("zero1", overlap_comm=False),
    "fp32 on the wire": {**config("zero2"), "communication_data_type": "fp32"},
    "reduced to each": config("zero2", use_multi_rank_bucket_allreduce=False),
}


def test_one_rank():
    cases = {f"{name}, weights": (WEIGHTS, ds) for name, ds in RECIPES.items()}
    cases |= {f"{name}, activations": (ACTIVATIONS, ds) for name, ds in list(RECIPES.items())[::3]}
    for accumulation, name in ((2, "zero2"), (2, "tiny"), (3, "zero1")):
        cases[f"{name}, accumulated"] = WEIGHTS, config(name, accumulation=accumulation)
    for name, found in check(cases, 1, 1).items():
        states = sum(found.peak[kind] for kind in ("weights", "fp32 masters", "optimizer state", "gradient partition"))
        if "activations" in name:
            assert found.peak["activations"] > found.peak.total() / 2, name
        else:
            assert states > found.peak.total() / 2, name


@pytest.mark.parametrize(
    ("world_size", "ep_size", "names"),
    [
        (2, 1, ["bf16, fp32 sums", "bf16, bf16 sums", "fp32", "ZeRO-1"]),
        (2, 2, ["bf16, fp32 sums", "bf16, bf16 sums", "reduced to each", "fp32 on the wire"]),
        (4, 2, ["bf16, fp32 sums"]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_several_ranks(world_size, ep_size, names):
    cases = {name: (WEIGHTS, RECIPES[name]) for name in names}
    if world_size == 2:
        cases["activations"] = ACTIVATIONS, config("zero2")
    check(cases, world_size, ep_size, off=0.03)  # what garbage is left differs


def test_dropout_jitter_sigmoid_and_no_latents():
    model, micro_batch, seq_len = ACTIVATIONS
    changes = {
        "all": {"expert_dropout": 0.1, "router_jitter_noise": 0.01, "router_score": "sigmoid"},
        "none": {"num_latent_tokens": 0},
    }
    check(
        {name: (({**model, **change}, micro_batch, seq_len), config("zero2")) for name, change in changes.items()}, 1, 1
    )


def test_routing_that_differs_from_expert_to_expert():
    check({"sparse": (SPARSE, config("zero2"))}, 1, 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_recomputed_blocks(world_size):
    deep = {**ACTIVATIONS[0], "num_hidden_layers": 6}, *ACTIVATIONS[1:]
    cases = {"deep": (deep, config("zero2"))}
    stored, some = [check(cases, world_size, world_size, 0.03, blocks)["deep"] for blocks in (0, 4)]
    assert some.peak["activations"] < stored.peak["activations"] / 2


def test_large_vocabulary():
    cases = {"embedding": (EMBEDDING, config("zero2")), "logits": (LOGITS, config("zero2", 1_000_000))}
    cases["embedding, fp32"] = EMBEDDING, config("zero2_fp32")
    found = check(cases, 1, 1)
    assert found["embedding"].peak == found["embedding"].backward
    assert found["logits"].peak == found["logits"].forward
    assert found["logits"].peak["loss chunk"] > found["logits"].peak.total() / 2
