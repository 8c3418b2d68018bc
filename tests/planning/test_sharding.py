import inspect
import math
from functools import partial

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from refusals import has, only, sentences
from toy import PRESET, SHIPPED, ds_config, recipe_of, shipped

from megamoe.config.model import ModelConfig
from megamoe.model.decoder import Decoder
from megamoe.model.topology import ExpertTopology
from megamoe.planning import sharding
from megamoe.planning.sharding import Group, parameter_groups, read_setup, setup_problems
from megamoe.training import engine

CONFIG = ModelConfig(**PRESET)


def setup_of(ds, ranks=1, ep_size=1, model=CONFIG):
    return read_setup(model, recipe_of(ds, ranks), ep_size, 16, True)


@pytest.mark.parametrize("removed", ["reduce_bucket_size", "overlap_comm", None])
def test_what_a_json_leaves_out_is_read_as_deepspeed_reads_it(removed):
    for path in SHIPPED.glob("*.json"):
        ds = shipped(path.stem)
        ds["zero_optimization"].pop(removed, None)
        own, setup = DeepSpeedConfig(dict(ds)), setup_of(ds)
        assert setup.bucket == own.zero_config.reduce_bucket_size
        assert setup.overlap == own.zero_config.overlap_comm
        assert setup.zero_stage == own.zero_optimization_stage
        offload = own.zero_config.offload_optimizer
        assert setup.offload == (offload is not None and offload.device != "none")
        assert setup.all_reduce == own.zero_config.use_multi_rank_bucket_allreduce


def test_the_largest_expert_group_is_deepspeeds():
    own = inspect.signature(split_params_into_different_moe_groups_for_optimizer)
    assert own.parameters["max_group_size"].default == sharding.EXPERT_GROUP


MUON = {"use_muon": True}


# Pairs of every limit with each of the others.
@pytest.mark.parametrize(
    ("limit", "ep_size", "gated", "muon"),
    [
        (1000, 1, True, None),
        (1000, 2, False, MUON),
        (6144, 1, False, None),
        (6144, 2, True, MUON),
        (13_000, 2, False, None),
        (13_000, 1, True, MUON),
        (sharding.EXPERT_GROUP, 2, True, None),
        (sharding.EXPERT_GROUP, 1, False, MUON),
    ],
)
def test_groups_are_those_that_the_optimizer_is_given(muon, gated, ep_size, limit, monkeypatch):
    config = CONFIG.model_copy(update={"gated_mlp": gated})
    split = partial(split_params_into_different_moe_groups_for_optimizer, max_group_size=limit)
    monkeypatch.setattr(engine, "split_params_into_different_moe_groups_for_optimizer", split)
    monkeypatch.setattr(sharding, "EXPERT_GROUP", limit)
    with torch.device("meta"):
        model = Decoder(config, topology=ExpertTopology(config.num_local_experts, ep_size, ep_size))
    names = {parameter: name for name, parameter in model.named_parameters()}
    given = engine.parameter_groups(model, muon)
    ds = ds_config(2, **({"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}} if muon else {}))
    planned = parameter_groups(setup_of(ds, ep_size, ep_size, config))
    assert [list(group.sizes.items()) for group in planned] == [
        [(names[one], one.numel()) for one in group["params"]] for group in given
    ]
    for group, theirs in zip(planned, given, strict=True):
        assert group.ranks == (1 if group.expert else ep_size)
        assert bool(group.matrices) == theirs.get("use_muon", False)
        assert not group.matrices or sum(map(math.prod, group.matrices)) == sum(group.sizes.values())


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_owners_share_out_a_flat_group(ranks):
    group = Group({"a": 5, "b": 101, "c": 1, "d": 64}, ranks, False)
    owned = [0] * ranks
    place = 0
    for name, size in group.sizes.items():
        expected = [0] * ranks
        for element in range(place, place + size):
            expected[element // group.partition] += 1
        place += size
        assert group.owners(name) == {rank: count for rank, count in enumerate(expected) if count}
        owned = [one + other for one, other in zip(owned, expected, strict=True)]
    assert sum(owned) == 171
    assert group.partition * ranks == math.ceil(171 / (2 * ranks)) * 2 * ranks


def test_what_is_not_modelled_is_named():
    for section, key, value in (
        ("zero_optimization", "reduce_scatter", False),
        ("data_types", "grad_accum_dtype", "bf16"),
    ):
        ds = ds_config(2)
        ds["zero_optimization"].update(stage=1, offload_optimizer={"device": "cpu"})
        assert setup_problems(recipe_of(ds)) == []
        ds[section] = {**ds.get(section, {}), key: value}
        has(only(sentences(setup_problems(recipe_of(ds)))), "ds.json", f"{section}.{key}", "leave it out")
