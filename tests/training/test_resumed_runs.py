"""Whole runs over several ranks that go on from what another has left."""

import json
import os

import pytest
import torch
from devices import on_gpus
from ranks import run_new_ranks, run_ranks
from toy import ds_config, ds_of_samples, losses, shipped, train_here, write_inputs

from megamoe.checkpoint.index import read_index
from megamoe.launch.determinism import SETTINGS


# On a GPU sums have one order with `--deterministic` only, and each run is of new processes, as in its use.
@pytest.mark.parametrize(
    ("device", "ranks", "run_on"),
    [("cpu", 2, run_ranks), on_gpus(1, "cuda", 1, run_new_ranks), on_gpus(2, "cuda", 2, run_new_ranks)],
)
def test_a_resumed_run_has_bit_for_bit_the_losses_of_one_that_was_not_stopped(
    tmp_path, monkeypatch, device, ranks, run_on
):
    # New ranks take them over: they join before `train_here` could set them, as pretrain.py does before it joins.
    for name, value in SETTINGS.items() if device == "cuda" else ():
        monkeypatch.setenv(name, value)

    def train(folder, steps, **options):
        return run_on(
            ranks, train_here, {**run, "run_dir": str(tmp_path / folder), "steps": steps, **options}, device=device
        )[0]

    ds = shipped("zero2")  # bf16
    ds["scheduler"]["params"].update(warmup_num_steps=4, total_num_steps=40)
    noisy = {"expert_dropout": 0.1, "router_jitter_noise": 0.05}
    run = {**write_inputs(tmp_path, ds, noisy), "ep_size": ranks, "eval_interval": 3, "deterministic": device == "cuda"}
    whole = train("whole", 7)
    train("cut", 4)
    resumed = train("cut", 7, resume=True)
    assert losses(resumed) == losses(whole)
    for key in ("running_max_vio", "lr", "grad_norm"):
        assert [record[key] for record in resumed["train"]] == [record[key] for record in whole["train"]]
    evaluations = [[(record["step"], record["loss"]) for record in log["valid"]] for log in (whole, resumed)]
    assert set(evaluations[0]) <= set(evaluations[1])


def test_a_run_resumes_on_other_ranks_and_another_ep_size_and_keeps_its_newest_checkpoints(tmp_path):
    run = {**write_inputs(tmp_path, ds_of_samples(8)), "steps": 10}
    whole = run_ranks(1, train_here, {**run, "run_dir": str(tmp_path / "whole")})[0]
    cut = {**run, "run_dir": str(tmp_path / "cut"), "save_interval": 1, "keep_last": 2, "keep_every": 3}
    run_ranks(4, train_here, {**cut, "steps": 4, "ep_size": 2})
    run_ranks(2, train_here, {**cut, "steps": 7, "ep_size": 2, "resume": True})
    log = run_ranks(1, train_here, {**cut, "resume": True, "foreground_save": True})[0]
    torch.testing.assert_close(losses(log), losses(whole), atol=1e-5, rtol=0)
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert kept == ["latest", "step_10", "step_3", "step_6", "step_9"]
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["world_size"] == 4
    resumes = [json.loads(line) for line in (tmp_path / "cut" / "resumes.jsonl").read_text().splitlines() if line]
    assert [(one["world_size"], one["checkpoint"]) for one in resumes] == [(2, "step_4"), (1, "step_7")]
    assert read_index(tmp_path / "cut" / "checkpoints" / "step_6").topology.world_size == 2


def test_a_resume_passes_over_a_damaged_checkpoint(tmp_path):
    run = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "ep_size": 2, "save_interval": 2}
    whole = run_ranks(2, train_here, {**run, "steps": 6})[0]
    folder = tmp_path / "run" / "checkpoints"
    os.truncate(folder / "step_6" / "rank_00001.safetensors", 100)
    log = run_ranks(2, train_here, {**run, "steps": 8, "resume": True})[0]
    assert losses(log)[:6] == losses(whole)
    assert (folder / "latest").read_text() == "step_8.1"  # not among those that it has left behind


def test_a_run_starts_from_the_weights_of_anothers_newest_verified_checkpoint(tmp_path):
    run = {**write_inputs(tmp_path, ds_config(2)), "ep_size": 2}
    before = {**run, "run_dir": str(tmp_path / "first"), "steps": 12, "save_interval": 11}
    first = run_ranks(2, train_here, before)[0]
    start = {**run, "run_dir": str(tmp_path / "second"), "steps": 2, "init_from": str(tmp_path / "first")}
    second = run_ranks(2, train_here, start)[0]
    assert [record["step"] for record in second["train"]] == [1, 2]
    assert losses(second)[0] < losses(first)[0] - 0.5  # it has learned already
    assert second["train"][0]["lr"] == first["train"][0]["lr"]  # and starts again
    os.truncate(tmp_path / "first" / "checkpoints" / "step_12" / "rank_00000.safetensors", 50)
    again = run_ranks(2, train_here, {**start, "run_dir": str(tmp_path / "fourth")})[0]  # from the one that holds
    assert losses(again)[0] < losses(first)[0] - 0.5


def test_run_json_is_enough_to_repeat_the_run(tmp_path):
    run = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "steps": 3}
    first = run_ranks(1, train_here, run)[0]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(record["deepspeed"]))
    (tmp_path / "preset.json").write_text(json.dumps(record["model"]))
    again = run_ranks(record["world_size"], train_here, {**record["run"], "run_dir": str(tmp_path / "again")})[0]
    assert losses(again) == losses(first)
    assert record["versions"]["torch"] == torch.__version__
