"""slurm.sbatch, as it ships, under a real Slurm of two nodes."""

import re
import time

import pytest
from cluster import wait_for
from runs import inputs

from megamoe.training.sinks import read_log

STEPS = 60


class Job:
    """A job of slurm.sbatch, from the first host."""

    def __init__(self, cluster, folder, steps, *options, nodes="2", **limits):
        self.host = cluster.hosts["h1"]
        self.run_dir = folder / "runs" / "run"
        self.output = folder / "job.out"
        words = [f"--{key.replace('_', '-')}={value}" for key, value in limits.items()]
        sent = self.host.run(
            "sbatch", "--parsable", f"--nodes={nodes}", "--ntasks-per-node=2", f"--output={self.output}", *words,
            "launch_scripts/slurm.sbatch", *inputs(folder, steps, *options),
        )  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        self.id = sent.stdout.strip()

    @property
    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    @property
    def facts(self):
        shown = self.host.run("scontrol", "show", "job", self.id).stdout
        return dict(word.partition("=")[::2] for word in shown.split())

    def await_text(self, text, seconds=120):
        def seen():
            assert self.facts["JobState"] not in ("FAILED", "NODE_FAIL", "BOOT_FAIL"), self.said
            return text in self.said

        wait_for(seen, f"{text!r} does not come", seconds)

    def await_state(self, state, seconds=120):
        wait_for(lambda: self.facts["JobState"] == state, f"the job does not become {state}", seconds)

    def scontrol(self, *words):
        done = self.host.run("scontrol", *words)
        assert done.returncode == 0, done.stderr

    def losses(self):
        return {record["step"]: record["loss"] for record in read_log(self.run_dir)["train"]}

    def end(self):
        self.host.run("scancel", self.id)
        wait_for(lambda: self.facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the job does not end", 60)


@pytest.fixture
def submit(slurm, cluster, tmp_path):
    jobs = []

    def send(steps=STEPS, *options, **limits):
        jobs.append(Job(cluster, tmp_path, steps, *options, **limits))
        return jobs[-1]

    yield send
    for job in jobs:
        job.end()


@pytest.fixture(scope="module")
def unbroken(slurm, tmp_path_factory):
    """Losses by step of a job that nothing has stopped, and what it said."""
    job = Job(slurm, tmp_path_factory.mktemp("unbroken"), STEPS)
    job.await_state("COMPLETED")
    return job.losses(), job.said


def test_tiny_trains_over_both_nodes(unbroken):
    losses, said = unbroken
    assert "4 ranks, ep_size 1" in said
    assert list(losses) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("how", ["USR1", "requeue"])
def test_a_job_that_is_stopped_resumes_by_itself_with_the_same_losses(submit, unbroken, ending, how):
    with ending("sbatch until the first step is done"):
        job = submit()
        job.await_text("step=1 ")
    with ending({"USR1": "USR1 to a Slurm job", "requeue": "scontrol requeue"}[how] + ", until it trains again"):
        if how == "USR1":
            assert job.host.run("scancel", "--signal=USR1", "--batch", job.id).returncode == 0
        else:
            job.scontrol("requeue", job.id)
        wait_for(lambda: re.search(r"steps [1-9]\d* to", job.said), lambda: job.said, 120)
    job.await_state("COMPLETED")
    assert job.facts["Restarts"] == "1"
    assert re.search(r"stopped by a signal after step \d+", job.said)
    assert job.losses() == unbroken[0]


def test_a_job_saves_before_its_time_limit_and_resumes(submit):
    job = submit(100_000, time="1", signal="B:URG@1")  # by the job's end time alone: nobody listens to that signal
    job.await_text("stopped ahead of the time limit after step")
    wait_for(lambda: len(re.findall(r"steps [1-9]\d* to 100000", job.said)) == 1, "it does not resume", 60)


def test_a_cancelled_job_does_not_come_back(submit):
    job = submit(100_000)
    job.await_text("step=3 ")
    job.host.run("scancel", job.id)
    job.await_state("CANCELLED")
    time.sleep(5)
    assert job.facts["JobState"] == "CANCELLED"


def kill_rank(job, rank):
    """SIGKILL to a rank on the second host."""
    pattern = f"pretrain.py .*{job.run_dir}"
    ids = job.host.run("ssh", "h2", f"pgrep -f '^[^ ]*python.*{pattern}'").stdout.split()
    for process in ids:
        found = job.host.run("ssh", "h2", f"tr '\\0' '\\n' < /proc/{process}/environ")
        if f"SLURM_PROCID={rank}\n" in found.stdout:
            assert job.host.run("ssh", "h2", f"kill -9 {process}").returncode == 0
            return
    raise AssertionError(f"no rank {rank} among {ids}")


def test_a_job_that_loses_a_rank_resumes_from_its_last_checkpoint(submit, unbroken, ending):
    job = submit(STEPS, "--save_interval", "2")
    job.await_text("saved ")
    with ending("SIGKILL to a rank of a Slurm job, until it trains again"):
        kill_rank(job, 3)
        wait_for(lambda: re.search(r"steps [1-9]\d* to", job.said), lambda: job.said, 120)
    job.await_state("COMPLETED")
    assert job.facts["Restarts"] == "1"
    assert job.losses() == unbroken[0]


def test_a_job_that_loses_a_rank_before_any_checkpoint_ends(submit, ending):
    job = submit(100_000)
    job.await_text("step=3 ")
    with ending("SIGKILL to a rank of a Slurm job without a checkpoint") as end:
        kill_rank(job, 3)
        job.await_state("FAILED")
        end.code = job.facts["ExitCode"]
    assert job.facts["Restarts"] == "0"


def test_a_job_that_loses_a_node_continues_with_fewer(submit, cluster, ending):
    job = submit(100_000, "--save_interval", "5", nodes="1-2")
    job.await_text("saved ")
    with ending("power cut of a node of a Slurm job, until it trains on the other"):
        cluster.hosts["h2"].cut_power()
        job.await_text("2 ranks, ep_size 1", 150)
    assert re.search(r"steps [1-9]\d* to 100000", job.said)


def test_the_scripts_problems_end_the_job_once(submit):
    job = submit(100_000, "--ep_size", "3")
    job.await_state("FAILED")
    assert job.facts["ExitCode"] == "2:0"
    said = [
        line for line in job.said.splitlines() if line.startswith("error: ep_size is 3, which does not divide the 4")
    ]
    assert len(said) == 1
    assert job.facts["Restarts"] == "0"
