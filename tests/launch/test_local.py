"""The ranks of one host: what they are told, how signals reach them, and with which code they end. They train in
test_training_run.py."""

import json
import os
import signal
import subprocess
import sys

import pytest
from ranks import DEADLINE
from refusals import has, refusal

from megamoe.launch import local
from megamoe.launch.holders import pid_space
from megamoe.launch.local import default_ranks, run_ranks
from megamoe.launch.rank_info import RankInfo

END = """
import os, signal, sys
code = int(sys.argv[1 + int(os.environ["RANK"])])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize(
    ("ends", "code"),
    [((0, 0), 0), ((2, 2), 2), ((75, 75), 75), ((130, 130), 130), ((1, 1), 1), ((76, -9), 76), ((-9, -9), 137),
     ((0, -9), 137)],
)  # fmt: skip
def test_the_code_is_that_of_the_ranks_and_an_error_is_said_where_they_may_not_have_said_it(ends, code, capfd):
    assert run_ranks(["-c", END, *map(str, ends)], 2) == code
    said = capfd.readouterr().err
    line = f"error: the ranks exited with code {code}; if no line above says why, they were killed (out of memory?); "
    assert said == ("" if code in (0, 2, 75, 130) else f"{line}start again, a run with --resume.\n")


TELL = """
import json, os, sys
from dataclasses import astuple
from megamoe.launch.rank_info import find_rank_info
told = astuple(find_rank_info(os.environ)), os.environ["MEGAMOE_SCRIPT"], os.getpgrp() == os.getpid(), sys.stdin.read()
with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as file:
    json.dump(told, file)
"""


@pytest.mark.parametrize("port", [None, "12345"])
def test_a_rank_is_told_who_it_is_and_what_holds_it_and_reads_no_terminal(port, tmp_path, monkeypatch):
    if port:
        monkeypatch.setenv("MASTER_PORT", port)
    assert run_ranks(["-c", TELL, str(tmp_path)], 2) == 0
    monkeypatch.setenv("MASTER_PORT", "1x")
    has(refusal(run_ranks, [], 1), "MASTER_PORT is '1x'; give")
    told = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    shared = int(port) if port else told[0][0][5]
    holder = f"{os.getpid()},{pid_space()}"
    assert told == [[[rank, 2, rank, 2, "127.0.0.1", shared, "torch"], holder, True, ""] for rank in (0, 1)]


def test_a_rank_that_does_not_end_after_another_has_failed_is_killed(monkeypatch):
    monkeypatch.setattr(local, "END_SECONDS", 0.2)
    hang = "import os, sys, time; sys.exit(1) if os.environ['RANK'] == '0' else time.sleep(1000)"
    assert run_ranks(["-c", hang], 2) == 1


START = """
import sys
from megamoe.launch import local
local.SAME_INTERRUPT_SECONDS = float(sys.argv[1])
sys.exit(local.run_ranks(sys.argv[2:], 2))
"""
SAVES = "signal.signal(signal.SIGUSR1, lambda *_: [os.write(1, b'asked\\n'), time.sleep(1), os._exit(75)])"
HANGS = "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'asked\\n')); subprocess.Popen(['sleep', '1000'])"
WAIT = "import os, signal, subprocess, time\n{}\nos.write(1, b'ready\\n')\nwhile True: time.sleep(100)"


def started(rank, same_interrupt):
    """A process that runs two such ranks, which are ready."""
    words = [sys.executable, "-c", START, str(same_interrupt), "-c", WAIT.format(rank)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert [process.stdout.readline(), process.stdout.readline()] == ["ready\n", "ready\n"]
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_each_signal_asks_the_ranks_to_stop_and_may_arrive_twice(number):
    with started(SAVES, DEADLINE) as process:
        os.killpg(process.pid, number)  # as a terminal does
        assert [process.stdout.readline(), process.stdout.readline()] == ["asked\n", "asked\n"]
        process.send_signal(number)  # as a launcher that forwards it
        assert process.wait(DEADLINE) == 75


def test_a_signal_while_ranks_are_started_ends_all_that_are_loading_python(monkeypatch):
    def rank_info(rank, *rest):
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return RankInfo(rank, *rest)

    monkeypatch.setattr(local, "RankInfo", rank_info)
    assert run_ranks(["-c", WAIT.format("")], 2) == 130


def test_a_second_signal_ends_ranks_that_cannot_save_and_all_that_they_have_started():
    with started(HANGS, 0) as process:
        process.send_signal(signal.SIGINT)
        assert [process.stdout.readline(), process.stdout.readline()] == ["asked\n", "asked\n"]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
        assert process.stdout.read() == ""  # comes to its end when no process has it open


@pytest.mark.parametrize(("seen", "ranks"), [(0, 2), (1, 1), (8, 8)])
def test_there_is_a_rank_per_device_or_two_without_any(seen, ranks, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: seen)
    assert default_ranks() == ranks
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert default_ranks() == 2
