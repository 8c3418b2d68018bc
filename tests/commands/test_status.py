"""What a run's files say of it."""

import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from refusals import has, refusal
from toy import begin, check, train_here

from megamoe.checkpoint.opening import open_source
from megamoe.commands.status import Status, status
from megamoe.monitoring.log_files import write_event
from megamoe.utils.run_folder import RunFolder


@pytest.fixture
def said(capsys):
    def said(folder):
        status(Status(run=folder))
        return {line[:10].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}

    return said


def test_the_last_values_of_a_run_are_said_and_whether_it_is_done_or_can_be_resumed(inputs, tmp_path, said):
    run_ranks(2, train_here, {**inputs, "steps": 3, "save_interval": 2})
    folder = Path(shutil.copytree(inputs["run_dir"], tmp_path / "a run"))  # the ranks go on, and hold the lock
    *_, train, valid = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    found, source = said(folder), open_source(folder / "checkpoints/step_3")
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    assert found["model"] == f"{inputs['preset']}, {parameters:,} parameters on 2 ranks, ep_size 1"
    assert found["state"] == "done"
    assert found["step"].startswith("3 of 3, logged 0:0")
    assert (found["loss"], found["held out"]) == (f"{train['loss']:.4f}", f"{valid['loss']:.4f} at step 3")
    assert found["MaxVio"] == f"{train['max_vio']:.2f}, running {train['running_max_vio']:.2f}"
    has(found["speed"], f"{train['tokens_per_second']:,.0f} tokens/s, MFU ")
    has(found["checkpoint"], "step_3, saved 0:0")
    assert found["next"] == f"megamoe chat '{folder}'"

    (folder / "checkpoints/step_3/index.json").unlink()  # as if the save had been interrupted
    found = said(folder)
    assert found["state"] == "not running"
    has(found["checkpoint"], "step_2, saved")
    assert found["go on"].endswith(f" --run_dir '{folder}' --resume")


def test_a_run_that_has_just_begun_is_told_from_one_that_was_killed_before_its_first_step(inputs, said, monkeypatch):
    words = ["--ds_config", inputs["ds_config"], "--preset", inputs["preset"], "--steps", "4"]
    monkeypatch.setattr("sys.argv", ["megamoe/pretrain.py", "--local_rank=1", *words])
    checked = check({**inputs, "steps": 4})
    begin(checked)
    command = [sys.executable, "-m", "megamoe", "status", inputs["run_dir"]]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    has(lines, f"running: process {os.getpid()} on {socket.gethostname()}", "none is logged yet, of 4", "none yet")
    assert "go on" not in lines
    del checked  # which holds the lock
    found = said(Path(inputs["run_dir"]))
    assert found["state"].startswith("killed: no process holds it, and nothing says how it ended")
    assert found["checkpoint"] == "none yet"
    again = ["megamoe", "train", "--ranks", "1", *words, "--run_dir", inputs["run_dir"], "--auto_resume"]
    assert shlex.split(found["go on"]) == again


ENDS = {
    "death": ({"reason": "rank 1 on h died"}, "died after step 7, 0:00:30 ago: rank 1 on h died"),
    "stall": ({"reason": "no rank has made progress"}, "stalled after step 7, 0:00:30 ago: no rank has made progress"),
    "error": ({"reason": "the disk is full"}, "failed after step 7, 0:00:30 ago: the disk is full"),
    "stop": ({"reason": "by a signal"}, "stopped after step 7, 0:00:30 ago: by a signal"),
    "save": ({}, "killed: no process holds it, and nothing says how it ended; last heard of 0:00:00 ago"),
}


@pytest.mark.parametrize("event", ENDS)
def test_a_run_that_nobody_holds_is_said_to_have_ended_as_its_last_event_tells(event, tmp_path, said, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    values, state = ENDS[event]
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.enter({"last_step": 9}, [])
    del folder
    run = tmp_path / "runs" / "one"
    write_event(run, event, 7, {"time": time.time() - 30, **values})
    found = said(run)
    assert found["state"] == state
    has(found["go on"], "--run_dir", "--auto_resume")
    lock = run / "lock"
    lock.write_text(lock.read_text().replace(socket.gethostname(), "elsewhere"))
    elsewhere = said(run)["state"]
    assert elsewhere == state or (event == "save" and elsewhere.startswith(f"locked by process {os.getpid()} on else"))


def test_what_is_no_run_is_refused_and_the_runs_in_a_folder_have_a_line_each(tmp_path, capsys):
    universal = tmp_path / "step_3"  # with the record of its run
    RunFolder(universal).enter({}, [])
    for path in (tmp_path, tmp_path / "none", universal):
        has(refusal(status, Status(run=path)), f"{path} holds no run", "give a run folder")
    RunFolder(tmp_path / "one").enter({}, [])
    status(Status(run=tmp_path))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/one  step none is logged yet  loss -  killed: no process holds it")
    (tmp_path / "run.json").write_text('{"last_step": "3"}')
    has(refusal(status, Status(run=tmp_path)), f'{tmp_path}/run.json: last_step is "3", which no run has written')
