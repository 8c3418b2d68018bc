"""How a run ended is in its events, also where it was killed. What ranks tell of each other's end is in
tests/launch/test_exits.py, and of all at once in tests/commands/test_train.py."""

import os
import time

import pytest
from ranks import run_ranks
from toy import ds_config, train_here, write_inputs

from megamoe.launch.codes import FAILED, INTERRUPTED, LOST, REFUSED, STOPPED
from megamoe.monitoring.alerts import Alerts
from megamoe.monitoring.ends import tell_failure
from megamoe.monitoring.log_files import read_events, write_event


def test_the_start_after_a_kill_tells_of_a_death_and_what_it_cost_follows_from_the_events(tmp_path):
    run = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "eval_interval": 0}
    run_ranks(1, train_here, {**run, "steps": 3, "save_interval": 2})
    folder = tmp_path / "run"
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(lines[:3]))  # as if killed after step 3, before it was saved
    (folder / "checkpoints" / "step_3" / "index.json").unlink()
    for name in ("log.jsonl", "events.jsonl", "run.json"):
        os.utime(folder / name, (time.time() - 600,) * 2)
    run_ranks(1, train_here, {**run, "steps": 4, "resume": True})
    events = read_events(folder)
    kinds = ["start", "first_step", "save", "death", "resume", "first_step", "save", "end"]
    assert [one["event"] for one in events] == kinds
    start, first, save, death, resume, again, _, end = events
    assert (death["step"], resume["step"], end["step"]) == (3, 2, 4)  # one step is lost
    assert first["seconds"] > first["time"] - start["time"] >= 0
    assert again["time"] - death["time"] > 600  # from the last sign of life to the next step
    assert death["seen"] - death["time"] == pytest.approx(600, abs=300)
    assert 0 <= save["waited_seconds"] < end["time"] - start["time"]


@pytest.mark.parametrize(
    ("message", "code", "dead", "event", "reason"),
    [
        ("error: a\nerror: b", REFUSED, (), "error", "a"),
        ("Traceback ...\n  x\nKeyError: 'y'\nerror: rank 1 failed", FAILED, (), "error", "rank 1 failed"),
        ("error: rank 1 died; resume from the last checkpoint with --resume.", LOST, (1,), "death", "rank 1 died"),
        ("error: no rank has made progress", LOST, (), "stall", "no rank has made progress"),
        ("stopped by a signal before the first step", STOPPED, (), "stop", "stopped by a signal before the first step"),
        ("the ranks exited with code 130", INTERRUPTED, (), "stop", "the ranks exited with code 130"),
        ("the ranks exited with code 137", 137, (), "death", "the ranks exited with code 137"),
    ],
)
def test_a_failure_is_recorded_once_by_its_kind_in_a_folder_that_the_job_has_entered(
    message, code, dead, event, reason, tmp_path
):
    alerts = Alerts([], tmp_path)
    write_event(tmp_path, "death", 5, {"time": 0.0, "reason": "of an older job"})
    tell_failure(alerts, tmp_path, 6, message, code, dead)
    assert len(read_events(tmp_path)) == 1  # another job may hold the folder
    write_event(tmp_path, "resume", 5, {})
    for _ in range(2):
        tell_failure(alerts, tmp_path, 6, message, code, dead)
    _, _, end = read_events(tmp_path)
    assert (end["event"], end["step"], end["reason"]) == (event, 6, reason)
