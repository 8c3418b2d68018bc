"""multi_node_torchrun.sh, as it ships, started on two hosts."""

import re
import signal

import pytest
from cluster import wait_for
from runs import STOPPED, Run, inputs

SCRIPT = "launch_scripts/multi_node_torchrun.sh"


@pytest.fixture
def start(cluster, tmp_path):
    runs = []

    def launch(hosts=("h1", "h2"), steps=100_000, options=(), **variables):
        settings = {"HOSTS": "2", "RANKS": "2", "ENDPOINT": "h1:29400", **variables}
        words = [SCRIPT, *inputs(tmp_path, steps, *options)]
        started = [Run(cluster.hosts[name], tmp_path, words, settings) for name in hosts]
        runs.extend(started)
        return started

    yield launch
    for run in runs:
        run.end()


def test_tiny_trains_over_both_hosts(start):
    first, second = start(steps=3, options=["--ep_size", "2"])
    assert (first.wait(), second.wait()) == (0, 0), first.said + second.said
    assert "4 ranks, ep_size 2" in first.said + second.said
    assert first.latest == "step_3"


def test_a_host_that_does_not_join_is_missed(start):
    (first,) = start(hosts=["h1"], JOIN_TIMEOUT="8")
    assert first.wait() == 2
    assert first.errors == [
        "error: 1 of 2 hosts have joined at h1:29400 within 8 s (h1); start the same line on the others."
    ]


def test_a_host_that_cannot_reach_the_endpoint_exits_with_an_error(start):
    (second,) = start(hosts=["h2"], JOIN_TIMEOUT="5")
    assert second.wait() == 2
    (said,) = second.errors
    assert said.startswith("error: h2 cannot join at h1:29400: it cannot be reached from here within 5 s; start")


def test_a_signal_to_one_script_ends_the_ranks_of_both_with_a_checkpoint(start, ending):
    first, second = start()
    first.await_any("step=3 ", second)
    with ending("SIGTERM to one of two multi_node_torchrun.sh") as end:
        second.script.send_signal(signal.SIGTERM)
        end.code = second.wait()
    assert (first.wait(), end.code) == (STOPPED, STOPPED), first.said + second.said
    assert first.latest == f"step_{first.last_step}"
    assert first.processes() == []


def test_after_a_rank_was_killed_torchrun_restarts_from_the_last_checkpoint(start, ending):
    first, second = start(options=["--save_interval", "5", "--auto_resume"], MAX_RESTARTS="1")
    first.await_any("saved ", second)
    victim = next(rank for rank in first.ranks() if rank.environ()["RANK"] == "3")
    with ending("SIGKILL to a rank under torchrun, until all train again"):
        victim.kill()
        again = re.compile(r"ep_size 1; .*steps [1-9]\d* to")
        wait_for(lambda: again.search(first.said + second.said), lambda: first.said + second.said, 120)
    assert re.search(r"error: rank 3 on h[12] died, last heard of in step", first.said + second.said)
    before = first.last_step
    wait_for(lambda: first.last_step > before, "no step is made")
    first.script.send_signal(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (STOPPED, STOPPED), first.said + second.said


def test_after_a_host_has_lost_its_power_torchrun_continues_with_the_other(start, cluster, ending):
    first, second = start(options=["--save_interval", "5", "--auto_resume"], HOSTS="1:2", MAX_RESTARTS="1")
    first.await_any("saved ", second)
    with ending("power cut of the second host, under torchrun, until the first trains alone"):
        cluster.hosts["h2"].cut_power()
        first.await_text("2 ranks, ep_size 1", 150)
    first.script.send_signal(signal.SIGTERM)
    assert first.wait() == STOPPED, first.said


def test_a_job_that_is_asked_to_stop_while_its_ranks_load_is_not_started_again(start):
    first, second = start(MAX_RESTARTS="3")
    wait_for(lambda: len(first.ranks()) == 4, "no ranks", 60)
    first.script.send_signal(signal.SIGTERM)
    assert 0 not in (first.wait(), second.wait()), first.said + second.said
    assert "avg_loss" not in first.said + second.said
    assert first.processes() == []
