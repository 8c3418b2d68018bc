"""One rank of a large job, alone under torch's fake process group: the real model, engine and step."""

import pytest
from ranks import run_alone
from simulate import simulate
from toy import PRESET, recipe_of, shipped

from megamoe.config.model import ModelConfig
from megamoe.planning.sharding import read_setup

MODEL = {**PRESET, "num_local_experts": 8, "num_hidden_layers": 4, "vocab_size": 2000, "max_position_embeddings": 128}


def recipe(ranks):
    ds = shipped("zero2")
    ds["zero_optimization"]["reduce_bucket_size"] = 60_000
    return recipe_of(ds, ranks)


def test_a_rank_of_1024_takes_what_is_predicted():
    setup = read_setup(ModelConfig(**MODEL), recipe(1024), 8, 128, False)
    found = run_alone(simulate, setup, recipe(1024))
    groups = (
        "all_gather over 128", "all_gather over 1024", "all_reduce over 128", "all_reduce over 1024",
        "all_to_all over 8",
    )  # fmt: skip
    assert set(groups) == {name for name in found if " over " in name}
    for name in groups:
        predicted, measured = found[name]
        assert predicted == measured > 0, name
    for name, off in (("between", 0.01), ("peak", 0.05)):
        predicted, measured = found[name]
        assert predicted == pytest.approx(measured, rel=off), name
