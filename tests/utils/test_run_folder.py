"""Who trains in a run's folder, and what it says about the run."""

import errno
import fcntl
import json
import socket
import subprocess
import sys

import pytest

from megamoe.utils import run_folder
from megamoe.utils.errors import UserError
from megamoe.utils.run_folder import RunFolder, holder_of, last_record

HOLDER = """
import sys
from pathlib import Path
from megamoe.utils.run_folder import RunFolder

held = RunFolder(Path(sys.argv[1]))
held.enter({}, [])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process whose run trains in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_a_folder_is_refused_with_the_name_of_the_first_until_that_is_killed(tmp_path, holder):
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path)
    assert f"in use by process {holder.pid} on {socket.gethostname()}, since 20" in str(caught.value)
    assert str(holder_of(tmp_path)) in str(caught.value)
    holder.kill()
    holder.wait()
    assert holder_of(tmp_path) is None
    assert RunFolder(tmp_path).began is not None


def test_a_lock_that_may_end_soon_is_waited_for_as_long_as_a_file_server_keeps_it(tmp_path, holder, monkeypatch, capfd):
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: holder.kill() or holder.wait())
    assert RunFolder(tmp_path, waits=True).began is not None
    assert f"waiting up to 100 s for {tmp_path}, in use by process {holder.pid} on" in capfd.readouterr().err


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capfd):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    RunFolder(tmp_path).enter({}, [])
    assert "file system without locks" in capfd.readouterr().err


def test_a_foreign_folder_is_told_from_a_start_that_was_killed_early_and_is_left_alone(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / "tokenizer.json").write_text("half of")  # on a full disk, for example
    assert not RunFolder(tmp_path).is_foreign()
    (tmp_path / "lock").unlink()
    assert RunFolder(tmp_path).is_foreign()
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "thesis.txt").touch()
    assert RunFolder(tmp_path).is_foreign()
    assert (tmp_path / "lock").read_text() == "mine"


def test_a_folder_that_was_removed_or_made_again_is_gone_and_one_that_cannot_be_seen_now_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "MISS_SECONDS", 0)
    folder = RunFolder(tmp_path / "run")
    folder.enter({}, [])
    assert not folder.is_gone()
    (tmp_path / "run").rename(tmp_path / "aside")
    assert folder.is_gone()
    RunFolder(tmp_path / "run").enter({}, [])
    assert folder.is_gone()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "stat", lambda path: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale")))
        assert not folder.is_gone()


def test_a_run_that_came_first_is_not_written_over(tmp_path):
    late = RunFolder(tmp_path)
    assert late.began is None
    RunFolder(tmp_path).enter({"seed": 1}, [])
    with pytest.raises(UserError, match="has become another run"):
        late.enter({"seed": 2}, [])
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


def test_a_record_that_was_torn_by_a_kill_is_passed_over(tmp_path):
    RunFolder(tmp_path).enter({"seed": 1}, [])
    RunFolder(tmp_path).enter({"seed": 2}, [])
    with open(tmp_path / "resumes.jsonl", "a") as file:
        file.write('{"seed": 3, "mod')
    assert last_record(tmp_path)["seed"] == 2
    RunFolder(tmp_path).enter({"seed": 4}, [])
    assert last_record(tmp_path)["seed"] == 4


def test_a_record_that_is_no_record_is_a_sentence_and_not_passed_over(tmp_path):
    RunFolder(tmp_path).enter({"seed": 1}, [])
    (tmp_path / "resumes.jsonl").write_text('{"seed": 2}\n{"model": 1}\n')
    with pytest.raises(UserError, match="model is 1"):
        last_record(tmp_path)
    (tmp_path / "resumes.jsonl").write_text('{"seed": 2}\n{"seed" 1}\n')
    with pytest.raises(UserError, match="not valid JSON"):
        last_record(tmp_path)
