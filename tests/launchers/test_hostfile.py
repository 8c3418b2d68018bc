"""multi_node_pdsh.sh, as it ships, on two hosts: a run, and how ranks without an engine end. The loss of a host is in
test_power_cut.py."""

import re
import signal
import subprocess
from importlib.metadata import distribution

import pytest
from cluster import ROOT
from runs import Run, inputs

SCRIPT = "launch_scripts/multi_node_pdsh.sh"


@pytest.fixture
def start(cluster, stub, tmp_path, runs):
    def launch(*options, tree=stub, steps=100_000, until="", slots=1, **variables):
        hostfile = tmp_path / "hostfile"
        hostfile.write_text(f"h1 slots={slots}\nh2 slots={slots}\n")
        words = [str(tree / SCRIPT), str(hostfile), *inputs(tmp_path, steps, *options)]
        runs.append(Run(cluster.hosts["h1"], tmp_path, words, variables))
        if until:
            runs[-1].await_text(until)
        return runs[-1]

    return launch


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


@pytest.fixture
def busy_port(cluster):
    """A port of h1 on which a process listens."""
    listen = "import socket; s = socket.socket(); s.bind(('', 0)); s.listen(); print(s.getsockname()[1], flush=True); "
    words = cluster.hosts["h1"].words("python3", "-c", listen + "input()")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as listening:
        yield listening.stdout.readline().strip()
        listening.communicate("\n")


def test_a_run_trains_over_both_hosts_to_its_last_step(start):
    run = start("--ep_size", "2", tree=ROOT, steps=3)
    assert run.wait() == 0, run.said
    assert "2 ranks, ep_size 2" in run.said
    assert len(re.findall(r"step=3 avg_loss=", run.said)) == 1
    assert run.latest == "step_3"


def test_every_problem_of_every_host_is_named_at_once_and_nothing_starts(start, put_over, busy_port, tmp_path):
    inputs(tmp_path, 1)
    (tmp_path / "runs").mkdir()
    put_over(ROOT / "megamoe" / "__init__.py", '__version__ = "0.0.9"\n')
    put_over(distribution("torch")._path / "METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.9\n")
    put_over(tmp_path / "corpus")
    put_over(tmp_path / "runs")
    run = start(MASTER_PORT=busy_port)
    assert run.wait() == 2
    expected = [
        r"h2 has megamoe 0\.0\.9 \(source \w+\), but h1 has \S+ \(source \w+\); install the same on every host\.",
        r"h2 has torch 2\.12\.9, but h1 has \S+; install the same on every host\.",
        rf"h2 does not see {tmp_path}/corpus/train\.bin; put it on a file system that all hosts share\.",
        rf"h2 does not see {tmp_path}/corpus/train\.idx; put it on a file system that all hosts share\.",
        rf"h2 does not see the files that h1 writes next to the run folder {tmp_path}/runs/run; choose a --run_dir .*",
        rf"port {busy_port} is in use on h1; set MASTER_PORT to a free one, or leave it out\.",
    ]
    assert len(run.errors) == len(expected), run.said
    for error, pattern in zip(run.errors, expected, strict=True):
        assert re.fullmatch(f"error: {pattern}", error)
    assert not run.run_dir.exists()


# --- how it ends before its last step -------------------------------------------------------------------------------


def test_a_killed_rank_is_named_and_the_other_hosts_ranks_end(start):
    run = start(until="step=3 ", slots=2)
    run.ranks()[3].kill()
    code = run.wait()
    run.assert_none_left()
    assert code != 0
    error, _ = run.errors  # and the script's, of the code
    named = r"error: rank 3 on h2 died, last heard of in step \d+, .*; resume from the last checkpoint with --resume\."
    assert re.match(named, error)


@pytest.mark.parametrize(
    ("killed", "expected"), [("deepspeed", 128 + signal.SIGKILL), ("the script", -signal.SIGKILL), ("pdsh", 1)]
)
def test_a_killed_launcher_script_or_pdsh_leaves_no_rank_on_any_host_and_a_checkpoint(start, killed, expected):
    run = start(until="step=3 ")
    launchers = {
        "deepspeed": [one for one in run.processes("--force_multi") if one.cmdline()[1].endswith("deepspeed")],
        "pdsh": [one for one in run.processes("--world_info") if one.name().startswith("pdsh")],
        "the script": [run.script],
    }
    launchers[killed][0].kill()
    code = run.wait()
    run.assert_none_left()
    assert code == expected, run.said
    run.assert_saved_at_the_last_step()
    assert not list(run.run_dir.parent.glob(".exit-*")) or killed == "the script"
