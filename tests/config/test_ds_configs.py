"""Every shipped DeepSpeed configuration trains, and its checkpoints go on elsewhere."""

import math

import pytest
from ranks import run_ranks
from toy import SHIPPED, shipped, train_here, write_inputs


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.json")))
def test_a_shipped_configuration_trains_two_steps_and_resumes_on_other_ranks(tmp_path, name):
    ds = shipped(name)
    samples = 2 * ds["train_micro_batch_size_per_gpu"] * ds.pop("gradient_accumulation_steps")
    ds["train_batch_size"] = samples
    ds["train_micro_batch_size_per_gpu"] = 1
    run = write_inputs(tmp_path, ds)
    log = run_ranks(2, train_here, {**run, "run_dir": str(tmp_path / "run"), "steps": 2, "ep_size": 2})[0]
    assert [record["step"] for record in log["train"]] == [1, 2]
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in log["train"])
    assert log["train"][-1]["skipped_steps"] == 0
    on = {**run, "run_dir": str(tmp_path / "run"), "steps": 3, "resume": True}
    assert run_ranks(1, train_here, on)[0]["train"][-1]["step"] == 3
