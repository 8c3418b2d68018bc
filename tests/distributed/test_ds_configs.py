"""Every shipped DeepSpeed configuration trains."""

import math

import pytest
from ranks import run_ranks
from toy import SHIPPED, train_here, write_inputs

from megamoe.config import read_json


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.json")))
def test_a_shipped_configuration_trains_two_steps(tmp_path, name):
    run = write_inputs(tmp_path, read_json(SHIPPED / f"{name}.json"))
    log = run_ranks(2, train_here, {**run, "run_dir": str(tmp_path / "run"), "steps": 2, "ep_size": 2})[0]
    assert [record["step"] for record in log["train"]] == [1, 2]
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in log["train"])
    assert log["train"][-1]["skipped_steps"] == 0
