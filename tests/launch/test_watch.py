"""Where a rank is, and which launcher it watches. That a job ends when a rank dies is in tests/launchers."""

import json
import os
import shlex
import subprocess
import sys
import time

import torch
from toy import PRESET

from megamoe.config import ModelConfig
from megamoe.launch.watch import MAX_SECONDS_BETWEEN_CHECKS, Position, StallTimer
from megamoe.model.decoder import Decoder


class Recorder(Position):
    def __init__(self):
        self.places = []
        super().__init__()

    def at(self, activity, step=None):
        super().at(activity, step)
        self.places.append(str(self))


def places(recompute_blocks=0):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**PRESET), recompute_blocks=recompute_blocks)
    position = Recorder()
    position.follow(model.layers)
    position.at("reading data", 7)
    ids = torch.arange(16).unsqueeze(0)
    model(ids, ids).backward()
    return position.places


def test_a_step_is_followed_through_the_layers_forward_and_back():
    assert places() == [
        "step 7, reading data",
        "step 7, forward of layer 0",
        "step 7, forward of layer 1",
        "step 7, backward of layer 1",
        "step 7, backward of layer 0",
    ]


def test_a_recomputed_layer_is_followed_too():
    assert "step 7, forward of layer 0" in places(recompute_blocks=1)[4:]


def test_following_a_model_changes_neither_loss_nor_gradients():
    def run(follow):
        torch.manual_seed(0)
        model = Decoder(ModelConfig(**PRESET))
        if follow:
            Position().follow(model.layers)
        ids = torch.arange(16).unsqueeze(0)
        loss = model(ids, ids)
        loss.backward()
        return [loss, *(parameter.grad for parameter in model.parameters())]

    assert all(torch.equal(one, other) for one, other in zip(run(True), run(False), strict=True))


def clocked(monkeypatch, *checks):
    """What a StallTimer returns at (seconds, value) pairs of a clock."""
    now = iter([0.0, *(seconds for seconds, _ in checks)])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    timer = StallTimer()
    return [timer.seconds(value) for _, value in checks]


def test_a_stall_is_the_time_since_a_value_changed(monkeypatch):
    assert clocked(monkeypatch, (1, "a"), (2, "a"), (4, "a"), (5, "b"), (6, "b")) == [0, 1, 3, 0, 1]


def test_time_in_which_the_process_was_suspended_is_no_stall(monkeypatch):
    assert clocked(monkeypatch, (1, "a"), (2, "a"), (9000, "a"), (9001, "a")) == [
        0,
        1,
        1 + MAX_SECONDS_BETWEEN_CHECKS,
        7,
    ]


# A tree of processes: each starts the next, and the last one prints what launchers() returns for it.
LAST = """
import json, psutil
from megamoe.launch.watch import launchers
print(json.dumps([[child.pid, parent] for child, parent in launchers(psutil.Process())]))
"""


def chain(tmp_path, *names):
    """Pairs that a process sees which is started through scripts of these names, outermost first, and their pids."""
    script = tmp_path / "last.py"
    script.write_text(LAST)
    command = [sys.executable, str(script)]
    for name in reversed(names):
        if name == "sh":
            command = ["bash", "-c", f"echo $$; {shlex.join(command)}; true"]
            continue
        start = f"import os, subprocess; print(os.getpid(), flush=True); subprocess.run({command!r})"
        command = [sys.executable, "-c", start, name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *map(str, sys.path)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *pids, pairs = done.stdout.split("\n", len(names))
    return [int(pid) for pid in pids], json.loads(pairs)


def test_a_rank_below_an_ordinary_process_watches_nobody(tmp_path):
    _, pairs = chain(tmp_path, "other")
    assert pairs == []


def test_a_rank_below_torchrun_watches_its_agent_and_not_what_started_that(tmp_path):
    (_, agent), pairs = chain(tmp_path, "sh", "torchrun")
    assert [parent for _, parent in pairs] == [agent]


def test_a_rank_below_deepspeeds_launcher_watches_it_and_the_process_above(tmp_path):
    (runner, launcher), pairs = chain(tmp_path, "other", "deepspeed.launcher.launch")
    assert [parent for _, parent in pairs] == [launcher, runner]


def test_below_ssh_the_shell_and_sshd_are_watched_too(tmp_path):
    (sshd, shell, launcher), pairs = chain(tmp_path, "other", "sh", "deepspeed.launcher.launch")
    assert [parent for _, parent in pairs] == [launcher, shell, sshd]
