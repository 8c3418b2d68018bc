"""One rank of a large job, alone under torch's fake process group: the real model, engine and step."""

import contextlib
import json
import sys

import pytest
from ranks import run_alone, run_ranks
from toy import PRESET, recipe_of, shipped

from megamoe.commands import plan
from megamoe.config.model import ModelConfig
from megamoe.planning.simulate import measure, simulate
from megamoe.utils.json_files import read_json

MODEL = {**PRESET, "num_local_experts": 8, "num_hidden_layers": 4, "vocab_size": 2000, "max_position_embeddings": 128}


def config(bucket=60_000):
    ds = shipped("zero2")
    ds["zero_optimization"]["reduce_bucket_size"] = bucket
    return ds


def plan_here(words, said):
    sys.argv = words
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        plan.main()


def test_the_tool_simulates_a_rank_of_1024_which_takes_what_is_predicted(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "ds.json").write_text(json.dumps(config()))
    options = ["--gpus", 1024, "--ep_size", 8, "--preset", tmp_path / "model.json", "--ds_config", tmp_path / "ds.json"]
    options += ["--simulate", "--json", tmp_path / "plan.json"]
    run_alone(plan_here, ["plan.py", *map(str, options)], tmp_path / "said")
    assert "rank 0 of 1024, run alone on this CPU" in (tmp_path / "said").read_text()
    simulated = read_json(tmp_path / "plan.json")["simulated"]
    for kind, row in simulated["payload"].items():
        assert row["predicted"] == row["measured"] > 0, kind
    groups = {("all_gather", 1024), ("all_gather", 128), ("all_reduce", 1024), ("all_reduce", 128), ("all_to_all", 8)}
    assert set(simulated["payload"]) == {f"{kind} over {ranks}" for kind, ranks in groups}
    for name in ("between", "peak"):
        row = simulated["memory"][name]
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.01 if name == "between" else 0.05), name


def test_a_simulated_rank_takes_what_it_takes_among_real_ones():
    everywhere = ModelConfig(**{**MODEL, "num_experts_per_tok": 8})  # the same shapes whatever the values
    alone = run_alone(simulate, everywhere, recipe_of(config(), 2), 2, 64)
    among = run_ranks(2, measure, everywhere, recipe_of(config(), 2), 2, 64)[0]
    assert alone.payload == among.payload
    assert alone.between == pytest.approx(among.between, rel=0.01)
    assert alone.peak == pytest.approx(among.peak, rel=0.05)  # when the other rank's part comes is up to chance
