"""What must hold on every host. That hosts are asked is in tests/launchers."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import has, refusal

from megamoe.commands.preflight import read_hostfile
from megamoe.config.run import RunConfig
from megamoe.launch.host_checks import Finding
from megamoe.launch.preflight import Report, marker_next_to, needed_files, problems, report
from megamoe.launch.remote import reports_in
from megamoe.launch.versions import versions

TOOL = Path(__file__).parent.parent.parent / "tools" / "preflight.py"
RUN = RunConfig(ds_config="ds.json", run_dir="runs/mine")


def of_host(name, **changes):
    good = Report(name, "--steps 5", 0, {"torch": "2.13"}, [], True, "h2", "10.0.0.1", 1234, False, [])
    return replace(good, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"versions": {"torch": "2.12"}}, "h2 has torch 2.12, but h1 has 2.13; install"),
        ({"absent": ["/data/train.bin"]}, "h2 does not see /data/train.bin; put it on a file system"),
        (
            {"shares_run_folder": False},
            "h2 does not see the files that h1 writes next to the run folder runs/mine; choose",
        ),
        (
            {"findings": [Finding("warning", "cores", "3"), Finding("error", "GPUs", "0 of 8", "", "install")]},
            "h2: GPUs: 0",
        ),
        ({"started": "--steps 6"}, "h2 was started with '--steps 6', but h1 with '--steps 5'; start both alike"),
    ],
)
def test_what_is_wrong_with_a_host_names_it_and_the_remedy(changes, message):
    found = problems([of_host("h1"), of_host("h2", **changes)], RUN)
    assert len(found) == bool(message)
    assert all(problem.startswith(message) for problem in found)


def test_the_port_and_the_route_count_on_the_first_host_alone():
    first, second = of_host("h1", port_in_use=True, address=None), of_host("h2")
    assert problems([second, first], RUN) == []
    port, route = problems([first, second], RUN)
    assert port == "port 1234 is in use on h1; set MASTER_PORT to a free one, or leave it out."
    assert route.startswith("h1 has no route to h2; see that it can resolve")


def test_the_files_that_every_host_needs(tmp_path):
    run = RunConfig(
        ds_config="ds.json",
        preset="mine.json",
        data=[str(tmp_path), "b/prefix=2"],
        valid_data=["v/prefix"],
        init_from="w.pt",
    )
    assert [str(path) for path in needed_files(run)] == [
        "ds.json", "mine.json", f"{tmp_path}/train.bin", f"{tmp_path}/train.idx", "b/prefix.bin", "b/prefix.idx",
        "v/prefix.bin", "v/prefix.idx", "w.pt",
    ]  # fmt: skip
    phases = tmp_path / "phases.json"
    phases.write_text('{"phases": [{"data": ["x"], "tokens": 9}, {"data": ["x", "my_source:Mine"]}]}')
    needed = needed_files(RunConfig(ds_config="ds.json", data_schedule=str(phases)))
    assert needed == [Path(path) for path in ("ds.json", "x.bin", "x.idx", phases)]
    remote = RunConfig(ds_config="ds.json", data=["s3://b/x"], valid_data=["web=gs://b/x"])
    assert needed_files(remote) == [Path("ds.json")]
    assert needed_files(RunConfig(ds_config="ds.json", data=["x"])) == [Path(p) for p in ("ds.json", "x.bin", "x.idx")]


def test_a_report_is_of_this_host_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text("{}")
    run = RunConfig(ds_config="ds.json", data=["x"])
    made = report(run, "--steps 5", "127.0.0.1", tmp_path / "none", None)
    assert (made.host, made.versions, made.absent) == (socket.gethostname(), versions(), ["x.bin", "x.idx"])
    assert not made.shares_run_folder
    assert not made.port_in_use
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert report(run, "--steps 5", "127.0.0.1", None, port).port_in_use
    assert not report(run, "--steps 5", "127.0.0.1", None, port).port_in_use


def test_the_marker_is_next_to_a_run_folder_that_need_not_exist_and_is_removed(tmp_path):
    with marker_next_to(tmp_path / "runs" / "mine") as marker:
        assert marker.parent == tmp_path
        assert marker.is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ("does not exist; give a file with a line 'HOST slots=RANKS' for each host.",)),
        ("h1 slots=2\nh2 two\n", ("h2 two", "write a line 'HOST slots=RANKS' for each host")),
        ("h1 slots=2\nh2 slots=0\n", ("h2 has no slots; give at least 1",)),
    ],
)
def test_a_hostfile_that_is_missing_or_of_another_form_is_refused(tmp_path, text, parts):
    path = tmp_path / "hostfile"
    if text:
        path.write_text(text)
    has(refusal(read_hostfile, path), f"hostfile {path}", *parts)


def test_a_python_without_the_packages_says_which_it_lacks():
    words = ["report", "h2", "--", "--ds_config", "ds.json"]
    done = subprocess.run([sys.executable, "-S", TOOL, *words], capture_output=True, text=True)  # without site-packages
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {socket.gethostname()} has no torch, deepspeed, ")
    assert "pydantic" in line
    assert line.endswith(f" for {sys.executable}; install megamoe there, or activate its environment.")


def test_a_host_reports_without_deepspeed(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('it is not to be imported')")
    words = [sys.executable, TOOL, "report", "localhost", "--", "--ds_config", "ds.json"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    (found,) = reports_in(done.stdout)
    assert found.host == socket.gethostname()
