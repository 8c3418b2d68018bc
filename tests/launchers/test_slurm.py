"""slurm.sbatch, as it ships, under a real Slurm of two nodes: a run, and how ranks without an engine end. The loss of a
node is in test_power_cut.py."""

import re

import pytest
from cluster import ROOT
from jobs import Job

STEPS = 100


@pytest.fixture
def submit(slurm, cluster, stub, tmp_path):
    jobs = []

    def send(steps, *options, tree=stub, **nodes):
        jobs.append(Job(cluster, tmp_path / str(len(jobs)), steps, *options, tree=tree, **nodes))
        return jobs[-1]

    yield send
    for job in jobs:
        job.cancel()


def test_a_job_that_is_requeued_trains_on_over_both_nodes_with_the_losses_of_one_that_is_not(submit):
    job = submit(STEPS, "--save_interval", "1", tree=ROOT)
    job.await_text("saved ")
    assert job.host.run("scontrol", "requeue", job.id).returncode == 0
    job.await_state("COMPLETED")
    assert job.facts["Restarts"] == "1"
    unbroken = submit(STEPS, tree=ROOT)
    unbroken.await_state("COMPLETED")
    assert "2 ranks, ep_size 1" in unbroken.said
    assert list(unbroken.losses()) == list(range(1, STEPS + 1))
    assert job.losses() == unbroken.losses()
    assert len(re.findall(r"steps [1-9]\d* to", job.said)) == 1


def test_a_job_resumes_by_itself_after_a_signal_a_lost_rank_and_a_requeue(submit):
    job = submit(100_000, "--save_interval", "10")
    job.await_text("step=1 ")
    assert job.host.run("scancel", "--signal=USR1", "--batch", job.id).returncode == 0
    job.await_resumes(1)
    assert len(re.findall(r"stopped by a signal after step \d+", job.said)) == 1
    job.await_new_checkpoint()
    job.ranks()[1].kill()
    job.await_resumes(2)
    job.await_new_checkpoint()
    assert job.host.run("scontrol", "requeue", job.id).returncode == 0
    job.await_resumes(3)
    assert len(re.findall(r"stopped by a signal after step \d+", job.said)) == 2
    assert job.facts["Restarts"] == "3"
    job.cancel()
    assert (job.facts["JobState"], job.facts["Restarts"]) == ("CANCELLED", "3")


def test_a_configuration_error_ends_the_job_once(submit):
    job = submit(100_000, "--ep_size", "3", tree=ROOT, nodes="1", tasks=2)
    job.await_state("FAILED")
    assert job.facts["ExitCode"] == "2:0"
    assert len(re.findall(r"^error: ep_size is 3, which does not divide the 2", job.said, re.MULTILINE)) == 1
    assert job.facts["Restarts"] == "0"
