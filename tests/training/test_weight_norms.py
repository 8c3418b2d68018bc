"""The norms of the weights by kind, against those of a checkpoint in float64."""

import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from engines import BATCH, CONFIG, make, save, train
from ranks import run_ranks
from toy import shipped

from megamoe.checkpoint.opening import open_source
from megamoe.config.optimizers import MASTERS
from megamoe.data.batches import Batch
from megamoe.training.step import TrainStep, balancer_of

PARTS = {"tie_word_embeddings": False, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1}
OFFLOAD = {key: shipped("zero2_offload")[key] for key in ("bf16", "data_types", "zero_optimization")}
MUON = {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "weight_decay": 0.05}}}
CASES = {
    "ZeRO-1": (1, {}),
    "Muon, bf16": (2, {**MUON, "bf16": {"enabled": True}}),
    "offloaded": (2, {**OFFLOAD, "optimizer": {"type": "AdamW", "params": {}}}),
}
KINDS = {"norm": "norms", "experts": "experts", "router": "router", "self_attn": "attention", "mlp": "mlp",
         "embed_tokens": "embedding", "lm_head": "head", "mtp": "mtp"}  # fmt: skip


def norms_of_third_step(folder):
    """By case, with a checkpoint of the second step in its folder."""
    norms = {}
    for case, (stage, changes) in CASES.items():
        engine = make(2, stage, config=CONFIG.model_copy(update=PARTS), **changes)
        train(engine, 2)
        save(engine, folder / case, 2)
        step = TrainStep(engine, balancer_of(engine.module))
        ids = torch.arange(18).repeat(BATCH // dist.get_world_size(), 1)
        step.forward_backward([Batch(ids[:, :16], ids[:, 1:])])
        norms[case] = step.update(weight_norms=True).weight_norms
    return norms


def test_a_step_says_the_norms_of_the_masters_before_it_over_all_ranks(tmp_path):
    on_ranks = run_ranks(4, norms_of_third_step, tmp_path)  # two sets of experts, two replicas of each
    assert on_ranks.count(on_ranks[0]) == 4
    for case, norms in on_ranks[0].items():
        source, squares = open_source(tmp_path / case / "step_2"), Counter()
        for name, shape in source.shapes.items():
            kind = next(kind for part, kind in KINDS.items() if part in name)
            squares[kind] += source.read(name, MASTERS, 0, math.prod(shape)).double().square().sum().item()
        assert norms == pytest.approx({kind: math.sqrt(total) for kind, total in squares.items()}, rel=1e-6), case
        assert len(norms) == len(KINDS)
