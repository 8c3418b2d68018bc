"""Whole runs over several ranks: the same model for any split, and what ends them."""

import contextlib
import io
import threading
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from ranks import DEADLINE, run_ranks
from toy import PRECISION, ds_config, losses, new_store, train_here, write_inputs

from megamoe.checkpoint import verify
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config.run import RunConfig
from megamoe.data import token_files
from megamoe.data.prefetch import THREAD
from megamoe.launch import stopping
from megamoe.launch.stopping import StopRequest
from megamoe.launch.watch import Position
from megamoe.monitoring.log_files import read_log
from megamoe.pretrain import check_run
from megamoe.pretrain import run as pretrain
from megamoe.utils.errors import UserError

STEPS = 12


@pytest.fixture(scope="module")
def one_rank_losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    run = write_inputs(folder, ds_config(micro_batch=8))
    return losses(run_ranks(1, train_here, {**run, "run_dir": str(folder / "run"), "steps": STEPS})[0])


@pytest.mark.parametrize(("world_size", "ep_size", "micro_batch"), [(2, 1, 4), (2, 2, 1), (4, 2, 2), (4, 4, 1)])
def test_the_same_batches_give_the_same_losses_on_any_split(
    tmp_path, one_rank_losses, world_size, ep_size, micro_batch
):
    ds = ds_config(micro_batch, accumulation=8 // (world_size * micro_batch))
    run = {**write_inputs(tmp_path, ds), "run_dir": str(tmp_path / "run"), "steps": STEPS, "ep_size": ep_size}
    log = run_ranks(world_size, train_here, run)[0]
    assert len(one_rank_losses) == STEPS
    assert one_rank_losses[-1] < one_rank_losses[0] - 0.5  # it learns, so the losses can tell
    torch.testing.assert_close(losses(log), one_rank_losses, atol=1e-5, rtol=0)


def test_documents_that_do_not_see_each_other_give_the_same_losses_on_any_split(tmp_path, one_rank_losses):
    found = {}
    for world_size, micro_batch in ((1, 8), (2, 2)):
        folder, preset = tmp_path / str(world_size), {"document_attention": True}
        run = write_inputs(folder, ds_config(micro_batch, 8 // (world_size * micro_batch)), preset, item=7)
        run |= {"run_dir": str(folder / "run"), "steps": STEPS, "ep_size": world_size, "eval_interval": STEPS}
        found[world_size] = run_ranks(world_size, train_here, run)[0]
    torch.testing.assert_close(losses(found[2]), losses(found[1]), atol=1e-5, rtol=0)
    assert found[2]["valid"][-1]["loss"] == pytest.approx(found[1]["valid"][-1]["loss"], abs=1e-5)
    assert abs(losses(found[1])[-1] - one_rank_losses[-1]) > 1e-3


def threads_of_data():
    """Names of those that stay after a run."""
    threads = [one for one in threading.enumerate() if one.name.startswith(THREAD)]
    for one in threads:
        one.join(DEADLINE)  # a run that fails does not wait for what its thread reads
    return [one.name for one in threads if one.is_alive()]


def train_past_the_scan(run):
    """What a run raises whose corpora are scanned in their first 30 tokens only, and what threads of its data stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "SCAN", 30)
        with pytest.raises(UserError) as caught:
            train_here(run)
    return caught.value.problems, threads_of_data()


def test_an_id_beyond_the_vocabulary_ends_the_run_with_its_sentence_when_its_batch_comes(tmp_path):
    run = {**write_inputs(tmp_path, ds_config(micro_batch=40)), "run_dir": str(tmp_path / "run")}
    tokens = np.memmap(tmp_path / "corpus" / "train.bin", dtype=np.int16, mode="r+")
    tokens[3000] = 96
    tokens.flush()
    ((problems, threads),) = run_ranks(1, train_past_the_scan, run)
    assert len(problems) == 1
    assert "holds token id 96, beyond the model's vocabulary of 96" in problems[0]
    assert not threads
    assert 1 <= len(read_log(tmp_path / "run")["train"]) < 10  # an epoch has 374 samples


def train_to_the_limit(run, left, saving):
    """Train where rank 1 always has `left` seconds to its time limit, and a save should take `saving` seconds; returns
    whether the run reached its last step, what it printed on this rank, and what threads of its data stay."""
    rank, limit = torch.distributed.get_rank(), 1e6
    now = psutil.Process().create_time() + rank * (limit - left)
    checked = check_run(RunConfig(**run, time_limit=limit), 2, torch.device("cpu"), PRECISION, rank == 0)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(stopping, "time", SimpleNamespace(time=lambda: now))
        patch.setattr(CheckpointWriter, "expected_seconds", lambda writer: saving)
        done = pretrain(checked, new_store("run"), Position(), StopRequest())
    return done, out.getvalue(), threads_of_data()


@pytest.mark.parametrize(
    ("left", "saving", "last"), [(1.5, 1, 1), (0, 0, 2)]
)  # the first step's time is known after it
def test_a_run_saves_and_leaves_when_one_rank_has_no_time_for_another_step(tmp_path, left, saving, last):
    run = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "steps": 4}
    (done, said, threads), other = run_ranks(2, train_to_the_limit, run, left, saving)
    assert (done, threads) == (False, [])
    assert (other[0], other[2]) == (False, [])
    assert said.count(f"stopped before the time limit after step {last}; continue with --resume") == 1
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.glob("step_*")] == [f"step_{last}"]
    assert verify.problems(checkpoints / f"step_{last}") == []
    assert len(read_log(tmp_path / "run")["train"]) == last
