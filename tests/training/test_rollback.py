"""Whole runs that meet bad data: what they skip, where they go back to, and what they read from there on."""

import shutil

import pytest
import torch
from corpora import train_data
from ranks import run_ranks
from toy import PRESET, ds_of_samples, losses, run_and_hear, train_here, write_inputs, write_phases

from megamoe.data.batches import TrainData
from megamoe.data.ledger import read_ledger
from megamoe.data.token_files import TokenCorpus
from megamoe.monitoring.log_files import read_events
from megamoe.training.step import TrainStep

MARK = PRESET["vocab_size"] - 1  # all labels of a poisoned batch
SPIKES, NOT_FINITE = (12, 13, 14), 6  # data steps
SAMPLES = 4
GUARD = {
    "guard": "act", "guard_window": 4, "guard_deviations": 20.0, "guard_skips": 3, "save_interval": 1, "steps": 16,
    "eval_interval": 0, "ema_decay": 0.9,
}  # fmt: skip


def train_on_poisoned_data(run, spikes=SPIKES):
    """Train; returns the log and the first tokens of all samples of this rank, step by step."""
    read, rank = [], torch.distributed.get_rank()
    step_batches, forward_backward = TrainData.step_batches, TrainStep.forward_backward

    def poisoned(data, step, *args):
        for batch in step_batches(data, step, *args):
            if step in spikes or step == NOT_FINITE:
                batch.labels[:] = MARK
                batch.labels[:, 0] = step
            yield batch

    def watched(train_step, batches):
        read.append([row.tolist() for batch in batches for row in batch.input_ids])
        forward_backward(train_step, batches)
        step = batches[0].labels[0, 0].item() if (batches[0].labels[:, 1:] == MARK).all() else None
        for group in train_step.engine.optimizer.averaged_gradients.values() if step and rank == 0 else ():
            for gradient in group:
                gradient.mul_(torch.nan if step == NOT_FINITE else 1e4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainData, "step_batches", poisoned)
        patch.setattr(TrainStep, "forward_backward", watched)
        log = train_here(run)
    return log, read


def events(folder):
    """Those of the guard."""
    kinds = ("skip", "warning", "rollback")
    return [{**one, "time": 0} for one in read_events(folder) if one["event"] in kinds]


def samples_of(data_step, folder):
    """The tokens of the samples of a data step, as the order of the run has them."""
    corpus = TokenCorpus(folder / "corpus" / "train", 16, PRESET["vocab_size"])
    (batch,) = train_data([corpus], [1.0], SAMPLES, seed=1234).step_batches(data_step, 0)
    return sorted(row.tolist() for row in batch.input_ids)


def killed_since(whole, folder, run):
    """Options that resume a copy of a run as if killed before it has saved anything since it went back: what it has
    gone back from is not what it resumes from."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").glob("step_*.1"):
        shutil.rmtree(path)
    return {**run, "run_dir": str(folder), "resume": True}


def of_all_ranks(results, number):
    return sorted(row for _, read in results for row in read[number])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, run, results) of a run on two ranks that was not stopped; Muon, with AdamW for what is no matrix."""
    folder = tmp_path_factory.mktemp("guarded")
    optimizer = {"type": "Muon", "params": {"lr": 1e-2, "muon_lr": 5e-3, "momentum": 0.9}}
    run = {**write_inputs(folder, {**ds_of_samples(SAMPLES), "optimizer": optimizer}), **GUARD, "ep_size": 2}
    return folder, run, run_ranks(2, train_on_poisoned_data, {**run, "run_dir": str(folder / "whole")})


@pytest.fixture(scope="module")
def cut(whole, tmp_path_factory):
    """The same run, stopped after two of three spikes in a row."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    run_ranks(2, train_on_poisoned_data, {**whole[1], "run_dir": str(folder), "steps": 13})
    return folder


def test_spikes_and_a_nan_of_one_rank_are_skipped_and_several_in_a_row_send_the_run_back_past_their_data(whole):
    folder, _, results = whole
    found = events(folder / "whole")
    assert [(one["event"], one["step"], one["reason"].split()[0]) for one in found] == [
        ("skip", 6, "not"), *(("skip", step, "spike") for step in SPIKES), ("rollback", 14, "the"),
    ]  # fmt: skip
    assert [len(one["samples"]) for one in found[:4]] == [SAMPLES] * 4
    assert found[0]["norm"] is None
    assert found[1]["norm"] > found[1]["norm_mean"] + 20 * found[1]["norm_deviation"]
    assert (found[-1]["to_step"], found[-1]["next_data_step"], found[-1]["checkpoint"]) == (11, 15, "step_11")
    assert read_ledger(folder / "whole").data_step(12) == 15
    log, read = results[0]
    assert [row["step"] for row in log["train"]] == list(range(1, 17))
    assert [log["train"][-1][name] for name in ("skipped_steps", "guarded_steps", "rollbacks")] == [1, 0, 1]
    data_steps = [*range(1, 15), *range(15, 20)]  # of 14 steps, and of 12 to 16 once more
    assert len(read) == len(data_steps)
    for number, data_step in enumerate(data_steps):
        assert of_all_ranks(results, number) == samples_of(data_step, folder)


def test_a_resumed_run_takes_the_decisions_of_one_that_was_not_stopped_and_follows_its_ledger(whole, cut, tmp_path):
    folder, run, results = whole
    shutil.copytree(cut, tmp_path / "cut")
    resumed = run_ranks(2, train_on_poisoned_data, {**run, "run_dir": str(tmp_path / "cut"), "resume": True})
    assert losses(resumed[0][0]) == losses(results[0][0])
    assert resumed[0][0]["valid"] == results[0][0]["valid"]  # of the averaged weights too
    assert events(tmp_path / "cut") == events(folder / "whole")
    assert read_ledger(tmp_path / "cut") == read_ledger(folder / "whole")
    again = run_ranks(2, train_on_poisoned_data, killed_since(folder / "whole", tmp_path / "killed", run))
    assert losses(again[0][0]) == losses(results[0][0])
    assert again[0][0]["valid"] == results[0][0]["valid"]
    assert len(again[0][1]) == 5
    # On another number of ranks.
    longer = {**run, "run_dir": str(folder / "whole"), "resume": True, "steps": 18, "ep_size": 1}
    further = run_ranks(1, train_on_poisoned_data, longer)
    assert [of_all_ranks(further, number) for number in (0, 1)] == [samples_of(step, folder) for step in (20, 21)]


def test_with_batch_size_warmup_a_run_that_went_back_goes_on_as_one_that_resumes_there(tmp_path):
    run = {**write_inputs(tmp_path, ds_of_samples(8, 2)), **GUARD}
    run["data_schedule"] = write_phases(tmp_path, (2, 4), (4, 10), (8, None))
    whole = run_ranks(1, train_on_poisoned_data, {**run, "run_dir": str(tmp_path / "whole")})[0][0]
    # Step 12 reads the data of step 15, with as many samples.
    assert [row["batch_size"] for row in whole["train"]] == [2] * 4 + [4] * 7 + [8] * 5
    resumed = killed_since(tmp_path / "whole", tmp_path / "killed", run)
    again = run_ranks(1, train_on_poisoned_data, resumed)[0][0]
    assert losses(again) == losses(whole)
    assert again["valid"] == whole["valid"]


def test_a_run_that_was_stopped_in_the_step_that_sends_it_back_goes_back_before_it_trains(whole, cut, tmp_path):
    run = {**whole[1], "run_dir": str(shutil.copytree(cut, tmp_path / "run")), "resume": True}
    run_ranks(2, train_on_poisoned_data, {**run, "guard_skips": 2, "steps": 14})
    (rollback,) = [event for event in events(tmp_path / "run") if event["event"] == "rollback"]
    assert (rollback["step"], rollback["to_step"], rollback["next_data_step"]) == (13, 11, 14)


def test_a_run_that_goes_back_a_second_time_passes_over_the_data_of_both_times(tmp_path):
    run = {**write_inputs(tmp_path, ds_of_samples(SAMPLES)), **GUARD, "run_dir": str(tmp_path / "run")}
    results = run_ranks(1, train_on_poisoned_data, run, (*SPIKES, 17, 18, 19))
    rollbacks = [event for event in events(tmp_path / "run") if event["event"] == "rollback"]
    assert [(one["step"], one["to_step"], one["next_data_step"]) for one in rollbacks] == [(14, 11, 15), (16, 13, 20)]
    # Steps 1 to 14, 12 to 16 and 14 to 16 have read one data step after the other.
    assert [of_all_ranks(results, number) for number in range(22)] == [
        samples_of(data_step, tmp_path) for data_step in range(1, 23)
    ]


def test_no_spike_is_skipped_during_the_warm_up_of_the_learning_rate(tmp_path):
    ds = ds_of_samples(SAMPLES)
    ds["scheduler"]["params"]["warmup_num_steps"] = SPIKES[-1]
    run = {**write_inputs(tmp_path, ds), **GUARD, "run_dir": str(tmp_path / "run"), "steps": SPIKES[-1]}
    run_ranks(1, train_on_poisoned_data, run)
    assert [(event["event"], event["step"]) for event in events(tmp_path / "run")] == [("skip", NOT_FINITE)]


def test_without_a_checkpoint_to_go_back_to_the_run_ends_with_a_sentence(tmp_path):
    run = {**write_inputs(tmp_path, ds_of_samples(SAMPLES)), **GUARD, "run_dir": str(tmp_path / "run")}
    run["save_interval"] = 0
    codes, said = run_and_hear(1, train_on_poisoned_data, run)
    assert codes == [2]
    assert "after step 14: the last 3 steps were skipped, and" in said
    assert "holds no checkpoint of step 11 or before to go back to; lower --save_interval" in said


def test_without_a_spike_a_run_has_bit_for_bit_the_losses_of_one_without_a_guard(tmp_path):
    inputs = write_inputs(tmp_path, ds_of_samples(SAMPLES))
    logs = []
    for mode in ("off", "act"):
        run = {**inputs, "guard": mode, "guard_window": 4, "guard_deviations": 1e6, "run_dir": str(tmp_path / mode)}
        logs += run_ranks(1, train_here, {**run, "steps": 5})
    for name in ("loss", "grad_norm", "lr", "running_max_vio", "router_entropy_by_block"):
        assert [row[name] for row in logs[0]["train"]] == [row[name] for row in logs[1]["train"]]
    assert not any(events(folder) for folder in tmp_path.iterdir())
