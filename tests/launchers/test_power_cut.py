"""One of two hosts loses its power while a job of each launch script runs on both: each continues on the other host.

The jobs share one power cut, so that their waits for what cannot answer are the same wait.
"""

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from cluster import wait_for
from jobs import Job
from runs import STOPPED, Run, inputs

OPTIONS = ("--save_interval", "5", "--auto_resume")
ALONE = "2 ranks, ep_size 1"


@pytest.fixture(scope="module")
def jobs(slurm, stub, tmp_path_factory):
    """A job of each script, after the second host has lost its power and each job trains on the first one alone."""
    first, second = slurm.hosts["h1"], slurm.hosts["h2"]
    folders = {name: tmp_path_factory.mktemp(name) for name in ("pdsh", "torchrun", "slurm")}
    hostfile = folders["pdsh"] / "hostfile"
    hostfile.write_text("h1 slots=2\nh2 slots=2\n")

    scripts = stub / "launch_scripts"
    words = [str(scripts / "multi_node_pdsh.sh"), str(hostfile), *inputs(folders["pdsh"], 100_000, *OPTIONS)]
    pdsh = Run(first, folders["pdsh"], words, {"MAX_RESTARTS": "1", "MIN_HOSTS": "1"})
    words = [str(scripts / "multi_node_torchrun.sh"), *inputs(folders["torchrun"], 100_000, *OPTIONS)]
    settings = {"HOSTS": "1:2", "RANKS": "2", "ENDPOINT": "h1:29400", "MAX_RESTARTS": "1"}
    torchrun, other = (Run(host, folders["torchrun"], words, settings) for host in (first, second))
    slurm_job = Job(slurm, folders["slurm"], 100_000, "--save_interval", "5", tree=stub, nodes="1-2", tasks=2)

    def await_restart(job, launcher):
        job.await_text(ALONE)

    try:
        pdsh.await_text("saved ")
        torchrun.await_any("saved ", other)
        slurm_job.await_text("saved ")
        second.cut_power()
        with ThreadPoolExecutor(3) as pool:
            launchers = {"pdsh": pdsh, "torchrun": torchrun, "Slurm": slurm_job}
            list(pool.map(await_restart, launchers.values(), launchers))
        yield SimpleNamespace(pdsh=pdsh, torchrun=torchrun, slurm=slurm_job, hostfile=hostfile)
    finally:
        for run in (pdsh, torchrun, other):
            run.end()
        slurm_job.cancel()
        slurm.restore()


def assert_trains(run):
    before = run.last_step
    wait_for(lambda: run.last_step > before, "no step is made")


def test_under_pdsh_the_lost_ranks_are_named_and_a_signal_to_the_script_ends_the_run(jobs):
    run = jobs.pdsh
    assert "ranks 2, 3 on h2 have sent no heartbeat for 30 s" in run.said
    assert "continuing without a host: h2 does not answer by ssh" in run.said
    assert_trains(run)
    run.script.send_signal(signal.SIGTERM)
    assert run.wait() == STOPPED, run.said
    assert f"stopped by a signal after step {run.last_step}" in run.said
    run.assert_saved_at_the_last_step()
    run.assert_none_left()


def test_under_torchrun_the_job_continues_with_the_other_host(jobs):
    run = jobs.torchrun
    assert re.search(r"steps [1-9]\d* to 100000", run.said)
    assert_trains(run)
    run.script.send_signal(signal.SIGTERM)
    assert run.wait() == STOPPED, run.said


def test_under_slurm_the_job_continues_with_fewer_nodes(jobs):
    assert re.search(r"steps [1-9]\d* to 100000", jobs.slurm.said)


def test_without_min_hosts_a_host_that_is_down_is_an_error_and_nothing_starts(jobs, slurm, tmp_path):
    run = Run(
        slurm.hosts["h1"],
        tmp_path,
        ["launch_scripts/multi_node_pdsh.sh", str(jobs.hostfile), *inputs(tmp_path, 100_000)],
    )
    assert run.wait() == 2
    (error,) = run.errors
    assert error.startswith("error: h2 does not answer by ssh (")
    assert "see that it is up" in error
    assert not run.run_dir.exists()
