"""Requests to stop a run."""

import os
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megamoe.launch.exits import INTERRUPTED
from megamoe.launch.stopping import Deadline

# The main thread is in a call that does not return for a handler, as in a collective.
WAITING = """
import ctypes, sys, threading, time
from megamoe.launch.stopping import StopRequest
stop = StopRequest()
def tell():
    while not stop.asked:
        time.sleep(0.01)
    print("asked", flush=True)
threading.Thread(target=tell, daemon=True).start()
print("ready", flush=True)
end = time.monotonic() + 20
while time.monotonic() < end:  # a signal interrupts sleep
    ctypes.CDLL(None).sleep(20)
"""


def heed_signals():
    """Tests that run in the background have been started with these signals ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(program, **options):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], **pipes, **options)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def waiting():
    process = start(WAITING, preexec_fn=heed_signals)
    yield process
    process.kill()
    process.wait()


# A compiler runs below this process, as below torch.
COMPILING = """
import subprocess, sys
from megamoe.launch.exits import Stopped
from megamoe.launch.stopping import StopRequest
stop = StopRequest()
try:
    with stop.interrupting():
        compiler = subprocess.Popen(["sh", "-c", "sleep 60; true"])
        print("ready", flush=True)
        if compiler.wait():
            raise RuntimeError("Error building extension")
except Stopped as stopped:
    print(stopped, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the rank", "to the rank and its compiler"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_while_something_is_compiled_ends_the_compiler_and_the_wait_without_a_trace(number, send):
    with start(COMPILING, start_new_session=True, stderr=subprocess.PIPE, preexec_fn=heed_signals) as process:
        compilers = psutil.Process(process.pid).children(recursive=True)
        send(process.pid, number)
        assert process.stdout.readline() == "stopped by a signal before the first step\n"
        process.send_signal(number)  # again, as scripts do
        assert process.communicate("\n")[1] == ""
    assert process.returncode == 0
    assert psutil.wait_procs(compilers, timeout=10)[1] == []


def test_a_hang_up_that_is_ignored_stays_so():
    with start(WAITING, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:  # under nohup
        process.send_signal(signal.SIGHUP)
        assert select.select([process.stdout], [], [], 0.5)[0] == []
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_requests_a_stop_at_once_and_ends_nothing(waiting, number):
    waiting.send_signal(number)
    assert waiting.stdout.readline() == "asked\n"
    assert waiting.poll() is None


def test_a_second_ctrl_c_exits_at_once(waiting):
    waiting.send_signal(signal.SIGINT)
    assert waiting.stdout.readline() == "asked\n"
    time.sleep(0.7)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(10) == INTERRUPTED


def test_one_ctrl_c_that_arrives_twice_counts_once(waiting):
    waiting.send_signal(signal.SIGINT)
    waiting.send_signal(signal.SIGINT)  # from the terminal, and from a launcher that forwards it
    assert waiting.stdout.readline() == "asked\n"
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)


def test_other_requests_after_a_ctrl_c_change_nothing(waiting):
    waiting.send_signal(signal.SIGINT)
    assert waiting.stdout.readline() == "asked\n"
    time.sleep(0.7)
    waiting.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)


def test_without_a_limit_there_is_no_deadline():
    assert not Deadline(None, {}).within(1e9)


def test_a_limit_counts_from_the_start_of_the_process():
    age = time.time() - psutil.Process(os.getpid()).create_time()
    deadline = Deadline(age + 1000, {})
    assert deadline.within(1010)
    assert not deadline.within(900)


def test_the_end_of_a_slurm_job_counts_if_it_is_earlier():
    soon = {"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    assert Deadline(None, soon).within(110)
    assert not Deadline(None, soon).within(80)
    assert Deadline(10**9, soon).within(110)
    assert Deadline(0, soon).within(0)
