"""single_node.sh, as it ships: how ranks without an engine end. With one it is in tests/launch/test_training_run.py."""

import os
import signal
import time

import pytest
from cluster import ThisHost
from runs import INTERRUPTED, Run, inputs

SCRIPT = "launch_scripts/single_node.sh"


@pytest.fixture
def run(stub, tmp_path, runs):
    words = [str(stub / SCRIPT), "2", *inputs(tmp_path, 100_000, "--ep_size", "2")]
    runs.append(Run(ThisHost(DS_ACCELERATOR="cpu"), tmp_path, words))
    runs[0].await_text("step=5 ")
    return runs[0]


def test_a_second_ctrl_c_ends_a_run_that_cannot_save(run):
    ranks = run.ranks()
    ranks[0].suspend()  # so the other waits for it
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1.5)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == INTERRUPTED, run.said
    ranks[0].resume()
    run.assert_none_left()
