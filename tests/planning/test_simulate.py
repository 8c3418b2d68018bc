"""One rank of a large job, alone under torch's fake process group: the real model, engine and step."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ranks import run_alone, run_ranks
from toy import PRESET, SHIPPED

from megamoe.config import ModelConfig
from megamoe.json_files import read_json
from megamoe.planning.footprint import footprint
from megamoe.planning.sharding import read_setup
from megamoe.planning.simulate import measure, simulate
from megamoe.planning.traffic import collectives

TOOL = Path(__file__).parents[2] / "tools" / "plan.py"
MODEL = {**PRESET, "num_local_experts": 8, "num_hidden_layers": 4, "vocab_size": 2000, "max_position_embeddings": 128}


def config(bucket=60_000):
    ds = read_json(SHIPPED / "zero2.json")
    ds["zero_optimization"]["reduce_bucket_size"] = bucket
    return ds


def test_a_rank_of_64_takes_what_is_predicted():
    measured = run_alone(simulate, ModelConfig(**MODEL), config(), 64, 8, 128)
    setup = read_setup(ModelConfig(**MODEL), config(), 64, 8, 128, True)
    predicted = footprint(setup)
    assert predicted.between.total() == pytest.approx(measured.between, rel=0.01)
    assert predicted.peak.total() == pytest.approx(measured.peak, rel=0.05)
    payload = Counter()
    for one in collectives(setup):
        payload[one.kind, one.ranks] += one.payload
    assert payload == measured.payload


def test_the_tool_simulates_a_rank_of_1024(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "ds.json").write_text(json.dumps(config()))
    options = ["--gpus", 1024, "--ep_size", 8, "--preset", tmp_path / "model.json", "--ds_config", tmp_path / "ds.json"]
    options += ["--simulate", "--json", tmp_path / "plan.json"]
    done = subprocess.run([sys.executable, TOOL, *map(str, options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1024, run alone on this CPU" in done.stdout
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
    alone = run_alone(simulate, everywhere, config(), 2, 2, 64)
    among = run_ranks(2, measure, everywhere, config(), 2, 64)[0]
    assert alone.payload == among.payload
    assert alone.between == pytest.approx(among.between, rel=0.01)
    assert alone.peak == pytest.approx(among.peak, rel=0.05)  # when the other rank's part comes is up to chance
