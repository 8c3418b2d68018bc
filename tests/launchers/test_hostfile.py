"""multi_node_pdsh.sh, as it ships, on two hosts."""

import re
import signal
import subprocess
from importlib.metadata import distribution

import pytest
from cluster import ROOT, wait_for
from runs import STOPPED, Run, inputs

SCRIPT = "launch_scripts/multi_node_pdsh.sh"


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("h1 slots=2\nh2 slots=2\n")
    return path


@pytest.fixture
def start(cluster, tmp_path, hostfile):
    runs = []

    def launch(file=hostfile, steps=100_000, until="", options=(), **variables):
        words = [SCRIPT, str(file), *inputs(tmp_path, steps, *options)]
        runs.append(Run(cluster.hosts["h1"], tmp_path, words, variables))
        if until:
            runs[-1].await_text(until)
        return runs[-1]

    yield launch
    for run in runs:
        run.end()


@pytest.fixture
def put_over(cluster, tmp_path):
    """Show another file, or an empty folder, at a path as h2 sees it."""
    covered = []

    def cover(path, text=None):
        source = ["-t", "tmpfs", "none"]
        if text is not None:
            other = tmp_path / f"other-{path.name}"
            other.write_text(text)
            source = ["--bind", str(other)]
        done = cluster.hosts["h2"].run("mount", *source, str(path))
        assert done.returncode == 0, done.stderr
        covered.append(path)

    yield cover
    for path in covered:
        cluster.hosts["h2"].run("umount", str(path))


def test_tiny_trains_over_both_hosts(start):
    run = start(steps=3, options=["--ep_size", "2"])
    assert run.wait() == 0, run.said
    assert "4 ranks, ep_size 2" in run.said
    assert len(re.findall(r"step=3 avg_loss=", run.said)) == 1
    assert run.latest == "step_3"


# --- what is wrong before the start ---------------------------------------------------------------------------------


def test_a_missing_hostfile_is_an_error_and_not_one_silent_node(start, tmp_path):
    run = start(file=tmp_path / "none")
    assert run.wait() == 2
    assert run.errors == [
        f"error: hostfile {tmp_path / 'none'} does not exist; give a file with a line 'HOST slots=RANKS' for each host."
    ]
    assert not run.run_dir.exists()


def test_a_hostfile_of_another_form_is_refused(start, hostfile):
    hostfile.write_text("h1 slots=2\nh2 two\n")
    run = start()
    assert run.wait() == 2
    (said,) = run.errors
    assert "h2 two" in said
    assert "write a line 'HOST slots=RANKS' for each host" in said


def test_a_host_that_is_down_is_named(start, cluster):
    cluster.hosts["h2"].kill()
    run = start()
    assert run.wait() == 2
    (said,) = run.errors
    assert said.startswith("error: h2 does not answer by ssh (")
    assert "see that it is up" in said
    assert not run.run_dir.exists()


def test_a_host_with_other_versions_is_named(start, put_over):
    put_over(ROOT / "megamoe" / "__init__.py", '__version__ = "0.0.9"\n')
    put_over(distribution("torch")._path / "METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.9\n")
    run = start()
    assert run.wait() == 2
    megamoe, torch = run.errors
    assert re.match(
        r"error: h2 has megamoe 0\.0\.9 \(source \w+\), but h1 has \S+ \(source \w+\); install the", megamoe
    )
    assert re.match(r"error: h2 has torch 2\.12\.9, but h1 has \S+; install the same on every host\.", torch)


def test_a_host_that_sees_neither_data_nor_run_folder_is_named(start, put_over, tmp_path):
    inputs(tmp_path, 1)
    (tmp_path / "runs").mkdir()
    put_over(tmp_path / "corpus")
    put_over(tmp_path / "runs")
    run = start()
    assert run.wait() == 2
    assert len(run.errors) == 3
    assert f"error: h2 does not see {tmp_path}/corpus/train.bin; put it on a file system that" in run.errors[0]
    assert f"next to the run folder {tmp_path}/runs/run; choose a --run_dir on a file system that" in run.errors[2]


def test_a_busy_port_is_named_with_its_host(start, cluster):
    listen = (
        "import socket; s = socket.socket(); s.bind(('', 29333)); s.listen(); print('listens', flush=True); input()"
    )
    words = cluster.hosts["h1"].words("python3", "-c", listen)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listening:
        listening.stdout.readline()
        run = start(MASTER_PORT="29333")
        assert run.wait() == 2
        listening.communicate(b"\n")
    assert run.errors == ["error: port 29333 is in use on h1; set MASTER_PORT to a free one, or leave it out."]


# --- how it ends ----------------------------------------------------------------------------------------------------


def test_a_signal_to_the_script_ends_all_ranks_with_a_checkpoint(start, ending):
    run = start(until="step=3 ")
    with ending("SIGTERM to multi_node_pdsh.sh, two hosts") as end:
        run.script.send_signal(signal.SIGTERM)
        end.code = run.wait()
    assert end.code == STOPPED, run.said
    assert f"stopped by a signal after step {run.last_step}" in run.said
    assert run.latest == f"step_{run.last_step}"
    assert run.processes() == []


def test_a_killed_rank_is_named_and_the_other_hosts_ranks_end(start, ending):
    run = start(until="step=3 ")
    with ending("SIGKILL to a rank on the second host, under pdsh, until all have exited") as end:
        next(rank for rank in run.ranks() if rank.environ()["RANK"] == "3").kill()
        end.code = run.wait(60)
        wait_for(lambda: run.processes() == [], "processes are left")
    assert end.code != 0
    (said,) = run.errors
    assert re.match(
        r"error: rank 3 on h2 died, last heard of in step \d+, .*; resume from the last checkpoint with --resume\.",
        said,
    )


def test_a_killed_launcher_leaves_no_rank_on_any_host_and_a_checkpoint(start, ending):
    run = start(until="step=3 ")
    (launcher,) = (one for one in run.processes("--force_multi") if one.cmdline()[1].endswith("deepspeed"))
    with ending("SIGKILL to deepspeed below multi_node_pdsh.sh, until all have exited") as end:
        launcher.kill()
        end.code = run.wait()
        wait_for(lambda: run.processes() == [], "processes are left", 60)
    assert end.code == 128 + signal.SIGKILL
    assert run.latest == f"step_{run.last_step}"


def test_after_a_host_has_lost_its_power_the_job_continues_with_those_that_answer(start, cluster, ending):
    run = start(options=["--save_interval", "5"], until="saved ", MAX_RESTARTS="1", MIN_HOSTS="1")
    with ending("power cut of the second host, under pdsh, until its loss is detected"):
        cluster.hosts["h2"].cut_power()
        run.await_text("have sent no heartbeat for")
    with ending("  from there until the first host trains alone"):
        run.await_text("2 ranks, ep_size 1")
    assert "ranks 2, 3 on h2 have sent no heartbeat for 30 s" in run.said
    assert "continuing without a host: h2 does not answer by ssh" in run.said
    before = run.last_step
    wait_for(lambda: run.last_step > before, "no step is made")
    run.script.send_signal(signal.SIGTERM)
    assert run.wait() == STOPPED, run.said
