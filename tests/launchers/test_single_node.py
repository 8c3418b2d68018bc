"""single_node.sh, as it ships: how a run ends."""

import os
import signal
import time

import pytest
from runs import INTERRUPTED, STOPPED, Run, ThisHost, inputs

SCRIPT = "launch_scripts/single_node.sh"
NO_GPU = (  # which DeepSpeed prints in every process, on a host without GPUs
    "[WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU. If you have GPU or other "
    "accelerator, we were unable to detect it."
)


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


def test_a_killed_script_leaves_no_orphan_and_a_checkpoint(run, ending):
    with ending("SIGKILL to single_node.sh, until all have exited"):
        run.process.kill()
        run.assert_none_left()
    run.assert_saved_at_the_last_step()


def test_launch_py_killed_below_the_script_is_a_failure_of_the_script(run, ending):
    (launcher,) = run.processes("-m deepspeed.launcher.launch")
    with ending("SIGKILL to launch.py below single_node.sh, until all have exited") as end:
        launcher.kill()
        end.code = run.wait(60)
        run.assert_none_left()
    assert end.code == 1, run.said
    run.assert_saved_at_the_last_step()


def test_when_all_ranks_are_killed_at_once_the_script_says_so(run):
    ranks = run.ranks()
    for rank in ranks:
        rank.suspend()  # or the first to be killed is named by the other
    for rank in ranks:
        rank.kill()
    code = run.wait(60)
    assert code == 256 - signal.SIGKILL, run.said
    assert run.errors == [
        f"error: the ranks exited with code {code}; if no line above says why, they were killed (out of memory?); "
        "resume with --resume."
    ]


def test_a_run_to_its_last_step_and_a_request_for_help_end_with_0_and_no_line_is_printed_per_rank(tmp_path):
    run = Run(ThisHost(), tmp_path, [SCRIPT, "2", *inputs(tmp_path, 2)])
    try:
        assert run.wait(100) == 0, run.said
    finally:
        run.end()
    lines = [line.partition("] ")[2] or line for line in run.said.splitlines()]  # without the time
    assert {line for line in lines if lines.count(line) > 1} <= {NO_GPU}, run.said
    assert "[launch.py" not in run.said
    asked = Run(ThisHost(), tmp_path, [SCRIPT, "1", "--help"])
    assert asked.wait(100) == 0, asked.said
    assert "--auto_resume" in asked.said
