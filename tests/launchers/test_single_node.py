"""single_node.sh, as it ships: how a run ends before its last step."""

import os
import signal
import time

import pytest
from runs import INTERRUPTED, STOPPED, Run, ThisHost, inputs

SCRIPT = "launch_scripts/single_node.sh"


@pytest.fixture
def run(tmp_path):
    started = Run(ThisHost(), tmp_path, [SCRIPT, "2", *inputs(tmp_path, 100_000, "--ep_size", "2")])
    try:
        started.await_text("step=5 ")
        yield started
    finally:
        started.end()


def test_ctrl_c_ends_all_with_a_checkpoint_and_exit_code_75(run, ending):
    with ending("Ctrl-C at single_node.sh") as end:
        os.killpg(run.process.pid, signal.SIGINT)
        end.code = run.wait(60)
    assert end.code == STOPPED, run.said
    run.assert_none_left()
    run.assert_saved_at_the_last_step()


def test_a_second_ctrl_c_ends_a_run_that_cannot_save(run, ending):
    ranks = run.ranks()
    ranks[0].suspend()  # so the other waits for it
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1.5)
    with ending("a second Ctrl-C at single_node.sh, one rank hanging") as end:
        os.killpg(run.process.pid, signal.SIGINT)
        end.code = run.wait(60)
    assert end.code == INTERRUPTED, run.said
    ranks[0].resume()
    run.assert_none_left()


def test_deepspeed_killed_below_the_script_leaves_no_orphan_and_a_checkpoint(run, ending):
    (launcher,) = run.processes("-m deepspeed.launcher.launch")
    with ending("SIGKILL to deepspeed below single_node.sh, until all have exited") as end:
        launcher.parent().kill()
        end.code = run.wait(60)
        run.assert_none_left()
    assert end.code == 128 + signal.SIGKILL
    run.assert_saved_at_the_last_step()
