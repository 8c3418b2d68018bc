"""multi_node_torchrun.sh, as it ships, started on two hosts: a run, and how ranks without an engine end. The loss of a
host is in test_power_cut.py."""

import re
import signal

import pytest
from cluster import ROOT, wait_for
from runs import STOPPED, Run, inputs

SCRIPT = "launch_scripts/multi_node_torchrun.sh"


@pytest.fixture
def start(cluster, stub, tmp_path, runs):
    def launch(*options, tree=stub, hosts=("h1", "h2"), steps=100_000, **variables):
        settings = {"HOSTS": "2", "RANKS": "1", "ENDPOINT": "h1:29400", **variables}
        words = [str(tree / SCRIPT), *inputs(tmp_path, steps, *options)]
        started = [Run(cluster.hosts[name], tmp_path, words, settings) for name in hosts]
        runs.extend(started)
        return started

    return launch


def test_a_run_trains_over_both_hosts_to_its_last_step(start):
    first, second = start("--ep_size", "2", tree=ROOT, steps=3)
    assert (first.wait(), second.wait()) == (0, 0), first.said + second.said
    assert "2 ranks, ep_size 2" in first.said + second.said
    assert first.latest == "step_3"


def test_after_a_killed_rank_torchrun_restarts_and_a_signal_to_one_script_ends_both_with_a_checkpoint(start):
    first, second = start("--save_interval", "5", "--auto_resume", RANKS="2", MAX_RESTARTS="1")
    first.await_any("saved ", second)
    first.ranks()[3].kill()
    again = re.compile(r"ep_size 1; .*steps [1-9]\d* to")
    wait_for(lambda: again.search(first.said + second.said), lambda: first.said + second.said)
    assert re.search(r"error: rank 3 on h[12] died, last heard of in step", first.said + second.said)
    before = first.last_step
    wait_for(lambda: first.last_step > before, "no step is made")
    second.script.send_signal(signal.SIGTERM)
    code = second.wait()
    assert (first.wait(), code) == (STOPPED, STOPPED), first.said + second.said
    first.assert_saved_at_the_last_step()
    first.assert_none_left()


def test_a_job_that_is_asked_to_stop_while_its_ranks_load_is_not_restarted(start):
    first, second = start(MAX_RESTARTS="3", STUB_LOADS="1")
    wait_for(lambda: len(first.ranks()) == 2, "no ranks")
    first.script.send_signal(signal.SIGTERM)
    assert 0 not in (first.wait(), second.wait()), first.said + second.said
    assert "avg_loss" not in first.said + second.said
    first.assert_none_left()
