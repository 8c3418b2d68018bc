"""The live view in a terminal, which is one again however the run ends."""

import os
import signal
import subprocess
import sys
import termios
import threading
import time
from queue import SimpleQueue

import pytest

from megamoe.monitoring.live import LiveView

DEADLINE = 60

PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from megamoe.launch import local
from megamoe.monitoring import live
local.SAME_INTERRUPT_SECONDS, local.END_SECONDS = 0, 0.2
assert live.is_wanted()
sys.exit(local.run_ranks(["-c", sys.argv[2], sys.argv[1]], 2, partial(live.shown, Path(sys.argv[1]))))
"""
RANK = """
import json, os, signal, sys, time
from pathlib import Path
from megamoe.monitoring.log_files import write_event
from megamoe.utils.run_folder import RunFolder
how, rank, run = sys.argv[1][-5:], os.environ["RANK"], Path(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"asked\\n") and how == "twice" or os._exit(75))
if rank == "1":
    Path(f"{run}.ready").touch()
else:
    folder = RunFolder(run)
    folder.enter({"last_step": 8, "preset": "tiny"}, [])
    write_event(run, "start", 0, {})
    values = {"loss": 3.25, "lr": 1e-3, "tokens_per_second": 5000.0, "mfu": 0.25, "max_vio": 0.5, "memory_gib": 1.5,
              "running_max_vio": 0.1, "seconds_left": 60.0}
    (run / "log.jsonl").write_text(json.dumps({"kind": "train", "step": 2, **values}) + chr(10))
    print("step=2 avg_loss=3.2500")
    for number in range(200):  # more than a pipe and a terminal take
        print(f"line {number} {'[x] ' * 250}", file=sys.stderr if number % 2 else sys.stdout)
    (run / "written").touch()
    if how == "fails":
        sys.exit(1)
while True:
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("how", "numbers", "code"),
    [("fails", [], 1), ("twice", [signal.SIGINT] * 2, 130), ("first", [signal.SIGINT], 75),
     ("ended", [signal.SIGTERM], 75)],
)  # fmt: skip
def test_lines_scroll_above_the_view_no_rank_waits_for_the_terminal_and_that_is_restored(how, numbers, code, tmp_path):
    run = tmp_path / how
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    before = termios.tcgetattr(slave)
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", PROGRAM, str(run), RANK]
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True)
    until = time.monotonic() + DEADLINE
    while not ((run / "written").exists() and run.with_suffix(".ready").exists()):  # while nobody reads the terminal
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    said = b""
    os.set_blocking(master, False)
    while process.poll() is None:
        assert time.monotonic() < until
        try:
            said += os.read(master, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
        if numbers and (b"3.2500" if len(numbers) == 1 + (how == "twice") else b"asked") in said:
            process.send_signal(numbers.pop())
    while True:
        try:
            said += os.read(master, 1 << 16)
        except BlockingIOError:
            break
    text = said.decode()
    assert process.returncode == code, text[-2000:]
    assert termios.tcgetattr(slave) == before
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown after it was last hidden
    places = [text.index(f"line {number} [x]") for number in range(200)]
    assert places == sorted(places)
    assert "step=2" not in text
    assert "go on: " in text[text.rindex("killed: no process holds it") :]


def test_a_last_picture_that_fails_ends_the_view(tmp_path, monkeypatch, capsys):
    def fail(view, activity):
        if activity is None:
            raise FileNotFoundError("a checkpoint that is gone")
        return ""

    monkeypatch.setattr(LiveView, "_picture", fail)
    lines = SimpleQueue()
    drawn = threading.Thread(target=LiveView(tmp_path, lines).draw, daemon=True)
    drawn.start()
    lines.put("a line")
    lines.put(None)
    drawn.join(DEADLINE / 6)
    assert not drawn.is_alive()
    assert "the live view failed (FileNotFoundError" in capsys.readouterr().out
