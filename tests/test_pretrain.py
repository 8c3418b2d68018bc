"""A run from start to end: when it is done, when it cannot go on, and what it resumes from."""

import json
import shutil

import numpy as np
import pytest
from corpora import prepared
from indexed import flip_bit
from ranks import run_ranks
from refusals import has, refusal, refusals
from s3_server import S3Server, use
from toy import check, check_here, ds_config, losses, new_store, run_and_hear, train_here, write_inputs

from megamoe.checkpoint.index import read_index
from megamoe.launch.stopping import StopRequest
from megamoe.launch.watch import Position
from megamoe.monitoring.console import ConsoleSink
from megamoe.pretrain import is_done
from megamoe.pretrain import run as pretrain


def test_problems_of_all_owners_come_together(inputs, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(ds_config(2, zero_optimization={"stage": 3})))
    wrong = {"ep_size": 3, "data": ["nowhere"], "resume": True, "seq_len": 17, "steps": 41}
    said = refusals(check, {**inputs, **wrong}, 2)
    parts = [
        "holds no run to resume", "ZeRO-3", "the 2 ranks", "the 4 experts", "nowhere.bin", "seq_len is 17",
        "steps is 41",
    ]  # fmt: skip
    assert len(said) == len(parts)
    assert all(any(part in problem for problem in said) for part in parts), said


def test_what_deepspeed_itself_refuses_is_a_sentence_too(inputs, tmp_path):
    for change, parts in (
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, ["device", "'gpu'", "nvme"]),
        ({"flops_profiler": {"enabled": "maybe"}}, ["DeepSpeed refuses", "'str'"]),  # a TypeError in its code
    ):
        (tmp_path / "ds.json").write_text(json.dumps(ds_config(2, **change)))
        has(refusal(check, inputs), *parts)


def test_compiling_without_a_compiler_is_refused(inputs):
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        has(refusal(check, {**inputs, "compile": True}), "--compile needs a C++ compiler")


def done_here(run):
    """Whether a start would find nothing to do."""
    return is_done(check_here(run))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that is done, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("done")
    run = {**write_inputs(folder, ds_config(2)), "run_dir": str(folder / "run"), "steps": 4, "save_interval": 2}
    run_ranks(2, train_here, {**run, "ep_size": 2})
    return folder, {**run, "ep_size": 2}


@pytest.fixture
def copied(done, tmp_path):
    """The same run, to be changed."""
    folder, run = done
    shutil.copytree(folder / "run", tmp_path / "run")
    return {**run, "run_dir": str(tmp_path / "run"), "auto_resume": True}


def test_a_run_whose_last_checkpoint_is_verified_is_done(copied):
    results, said = run_and_hear(2, done_here, copied)
    assert results == [True, True]
    assert "is at its last step, 4, already" in said
    results, said = run_and_hear(2, done_here, {**copied, "auto_resume": False, "resume": True})
    assert results == [2, 2]
    assert "at step 4 already and the run ends at 4; to train on, raise --steps" in said


def test_a_flipped_bit_in_the_newest_checkpoint_is_not_done_on_any_rank(copied, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step_4" / "rank_00001.safetensors"
    flip_bit(path, path.stat().st_size - 10)
    results, said = run_and_hear(2, done_here, copied)
    assert results == [False, False]
    assert "passed over" in said


def test_a_run_without_a_complete_checkpoint_begins_again_and_says_so(copied, tmp_path):
    for path in (tmp_path / "run" / "checkpoints").glob("step_*"):
        (path / "index.json").unlink()
    (log, _), said = run_and_hear(2, train_here, {**copied, "steps": 3})
    assert "holds no complete checkpoint, so the run begins again at step 0" in said
    assert [row["step"] for row in log["train"]] == [1, 2, 3]


def test_a_decay_branches_from_a_middle_checkpoint_of_a_constant_run_in_a_folder_of_its_own(tmp_path):
    params = {"warmup_type": "linear", "warmup_max_lr": 1e-2, "warmup_num_steps": 2}
    ds = ds_config(2, scheduler={"type": "WarmupLR", "params": params})
    run = {**write_inputs(tmp_path, ds), "run_dir": str(tmp_path / "stable"), "steps": 8, "save_interval": 4}
    stable = run_ranks(1, train_here, run)[0]
    assert [row["lr"] for row in stable["train"]] == [5e-3] + [1e-2] * 7
    (result,), said = run_and_hear(1, done_here, {**run, "resume": True})
    assert result == 2
    assert "is at step 8 already and the run ends at 8; to train on, raise --steps" in said

    (tmp_path / "branch" / "checkpoints").mkdir(parents=True)  # as docs/reference/schedules.md has it
    for file in (tmp_path / "stable").glob("*.json*"):
        shutil.copy(file, tmp_path / "branch")
    shutil.copytree(tmp_path / "stable" / "checkpoints" / "step_4", tmp_path / "branch" / "checkpoints" / "step_4")
    decay = {"type": "WarmupStableDecayLR", "params": {**params, "total_num_steps": 8, "decay_num_steps": 4}}
    (tmp_path / "ds.json").write_text(json.dumps({**ds, "scheduler": decay}))
    branch = {**run, "run_dir": str(tmp_path / "branch"), "steps": None, "resume": True}
    (log,), said = run_and_hear(1, train_here, branch)
    assert f"resumed from {tmp_path / 'branch' / 'checkpoints' / 'step_4'}" in said
    assert "the schedule changes after step 4 from " in said
    assert [row["lr"] for row in log["train"]] == pytest.approx([5e-3, *[1e-2] * 3, 7.5e-3, 5e-3, 2.5e-3, 0])
    # The rate first differs in the update of step 6.
    assert losses(log)[:6] == losses(stable)[:6]
    assert all(ours != theirs for ours, theirs in zip(losses(log)[6:], losses(stable)[6:], strict=True))
    (record,) = [json.loads(line) for line in (tmp_path / "branch" / "resumes.jsonl").read_text().split("\n") if line]
    assert (record["checkpoint"], record["deepspeed"]["scheduler"]) == ("step_4", decay)

    (tmp_path / "ds.json").write_text(json.dumps(ds))
    further = run_ranks(1, train_here, {**run, "steps": 9, "resume": True})[0]  # the stable run goes on
    assert losses(further)[:8] == losses(stable)


def test_a_run_that_diverges_ends_with_a_sentence_and_keeps_the_last_good_checkpoint(tmp_path):
    ds = ds_config(2)
    ds["scheduler"]["params"].update(warmup_max_lr=1e30, warmup_num_steps=3)
    run = {**write_inputs(tmp_path, ds), "run_dir": str(tmp_path / "run"), "save_interval": 1, "keep_last": 2}
    results, said = run_and_hear(2, train_here, run)
    assert results == [2, 2]
    assert said.count("the last 3 steps were skipped, for their gradients are not finite") == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "the last 20 steps were skipped" in line
    assert "lower the peak learning rate" in line
    kept = [read_index(path).training.skipped_in_window for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert kept.count(0) == 1
    assert len(kept) == 3


def remove_folder_after_a_step(run):
    """Train with a run folder that is removed once step 2 is logged."""
    checked = check_here(run)
    real = ConsoleSink.log_scalars

    def remove(self, kind, step, values):
        real(self, kind, step, values)
        if step == 2:
            shutil.rmtree(checked.run.folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConsoleSink, "log_scalars", remove)
        pretrain(checked, new_store("run"), Position(), StopRequest())


def test_a_run_folder_that_is_removed_ends_all_ranks_with_one_sentence(tmp_path):
    run = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "log_interval": 2}
    run["save_interval"] = 3
    results, said = run_and_hear(2, remove_folder_after_a_step, run)
    assert results == [2, 2]
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"after step 3: {tmp_path / 'run'} has been removed while the run trained in it" in line
    assert not (tmp_path / "run").exists()


def train_on_s3(run, variables):
    use(variables)
    return train_here(run)


def test_a_run_on_an_object_store_that_vanishes_for_some_requests_gives_the_losses_of_a_local_one(inputs, tmp_path):
    draw = np.random.default_rng(0)
    splits = {"train": [[draw.integers(0, 96, 900)] * 2, [draw.integers(0, 96, 70)]], "valid": [[range(96)]]}
    prepared(tmp_path / "mine", splits, 96)
    (local, _) = run_ranks(2, train_here, {**inputs, "data": [str(tmp_path / "mine")], "steps": 4})
    server = S3Server()
    try:
        server.fault = lambda number: "gone" if 4 <= number < 12 else None
        remote = {"data": [server.upload(tmp_path / "mine", "bucket")], "cache_dir": str(tmp_path / "cache")}
        changed = {**inputs, **remote, "steps": 4, "run_dir": str(tmp_path / "second")}
        log, _ = run_ranks(2, train_on_s3, changed, server.environment)
    finally:
        server.close()
    assert losses(log) == losses(local)
    assert [row["loss"] for row in log["valid"]] == [row["loss"] for row in local["valid"]] != []
    assert len(server.asked) > 12
