"""Who trains in a run's folder, and what it says about the run."""

import errno
import fcntl
import json
import socket
import subprocess
import sys

import pytest

from megamoe import run_folder
from megamoe.errors import UserError
from megamoe.run_folder import RunFolder, lock

HOLDER = """
import sys
from pathlib import Path
from megamoe.run_folder import lock

held = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_a_folder_is_refused_with_the_name_of_the_first(tmp_path, holder):
    with pytest.raises(UserError) as caught:
        lock(tmp_path)
    assert f"in use by process {holder.pid} on {socket.gethostname()}, since 20" in str(caught.value)


def test_the_lock_of_a_killed_run_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert lock(tmp_path)


def test_the_lock_of_another_host_is_waited_for_as_long_as_a_file_server_keeps_it(tmp_path, holder, monkeypatch, capfd):
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: holder.kill() or holder.wait())
    assert lock(tmp_path)
    assert f"waiting up to 100 s for {tmp_path}, in use by process {holder.pid} on" in capfd.readouterr().err


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capfd):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert lock(tmp_path) is None
    assert "file system without locks" in capfd.readouterr().err


def test_a_folder_with_nothing_but_a_lock_is_free_for_a_run(tmp_path):
    lock(tmp_path)
    assert not RunFolder(tmp_path).is_foreign()
    (tmp_path / "thesis.txt").touch()
    assert RunFolder(tmp_path).is_foreign()


def test_a_run_that_came_first_is_not_written_over(tmp_path):
    late = RunFolder(tmp_path)
    assert late.began is None
    RunFolder(tmp_path).enter({"seed": 1}, None)
    with pytest.raises(UserError, match="has become another run"):
        late.enter({"seed": 2}, None)
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


def test_a_record_that_was_torn_by_a_kill_is_passed_over(tmp_path):
    RunFolder(tmp_path).enter({"seed": 1}, None)
    RunFolder(tmp_path).enter({"seed": 2}, None)
    with open(tmp_path / "resumes.jsonl", "a") as file:
        file.write('{"seed": 3, "mod')
    assert RunFolder(tmp_path).last_record()["seed"] == 2
    RunFolder(tmp_path).enter({"seed": 4}, None)
    assert RunFolder(tmp_path).last_record()["seed"] == 4
