"""pretrain.py under DeepSpeed's own launcher on one host: how it ends before its last step. On a CPU it ends without an
engine; with one, below `megamoe train`, in tests/launch/test_training_run.py."""

import os
import re
import signal

import psutil
import pytest
from cluster import BIN, DEADLINE, ROOT, ThisHost
from devices import on_gpus
from runs import LOST, Run, inputs

from megamoe.launch.network import free_port


@pytest.fixture
def launch(stub, tmp_path, runs):
    def start(*options, device="cpu", ranks=2, until="step=5 "):
        tree = stub if device == "cpu" else ROOT
        launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
        words = [*launcher, str(tree / "megamoe" / "pretrain.py"), *inputs(tmp_path, 100_000, *options)]
        runs.append(Run(ThisHost(DS_ACCELERATOR=device), tmp_path, words))
        runs[-1].await_text(until)
        return runs[-1]

    return start


@pytest.mark.parametrize("device", ["cpu", on_gpus(2, "cuda")])
def test_a_killed_rank_is_named_and_the_other_ends(launch, device):
    run = launch(device=device)
    run.ranks()[1].kill()
    assert run.wait() == 256 - signal.SIGKILL, run.said
    (error,) = run.errors
    named = r"error: rank 1 on \S+ died, last heard of in step \d+, .*; resume from the last checkpoint with --resume\."
    assert re.match(named, error)
    run.assert_none_left()


@pytest.mark.parametrize(
    ("send", "number", "target"),
    [(os.kill, signal.SIGTERM, "deepspeed alone"), (os.killpg, signal.SIGINT, "deepspeed and all its processes")],
)
def test_ending_deepspeed_leaves_no_orphan_and_a_checkpoint(launch, send, number, target):
    run = launch()
    send(run.process.pid, number)
    run.wait()
    run.assert_none_left()
    run.assert_saved_at_the_last_step()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGKILL, 0)])
def test_ending_launch_py_alone_leaves_no_orphan_and_a_checkpoint(launch, number, code):
    run = launch()
    (launcher,) = run.processes("-m deepspeed.launcher.launch")
    launcher.send_signal(number)  # SIGTERM: it ends the ranks one after another; the first one's signal stops all
    assert run.wait() == code  # DeepSpeed's own, whatever became of the ranks
    run.assert_none_left()
    run.assert_saved_at_the_last_step()


@pytest.mark.parametrize("device", ["cpu", on_gpus(2, "cuda")])
def test_stalled_ranks_end_and_print_where_each_of_them_is(launch, device):
    run = launch("--collective_timeout", "5", device=device, until="step=200 ")  # each has posted that it is in a step
    first, second = run.ranks()
    second.suspend()
    assert psutil.wait_procs([first], timeout=DEADLINE)[1] == []
    (error,) = run.errors
    place = r"in step \d+, (forward of layer \d|backward of layer \d|optimizer step|reading data)"
    both, each = rf"ranks 0, 1 on \S+ {place}", rf"rank 0 on \S+ {place}; rank 1 on \S+ {place}"
    assert re.match(rf"error: no rank has made progress for 5 s: ({both}|{each}); resume from", error)
    second.resume()
    assert run.wait() == LOST, run.said
