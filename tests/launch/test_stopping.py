"""Requests to stop a run."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import threading
import time

import psutil
import pytest
from ranks import DEADLINE, start_processes

from megamoe.launch import stopping
from megamoe.launch.codes import INTERRUPTED, Stopped
from megamoe.launch.holders import is_alive
from megamoe.launch.stopping import Deadline, StopRequest


def wait_as_in_a_collective(pipe, seconds_of_one_interrupt, ignored=()):
    """Be a process whose main thread is in a call that does not return for a handler; it tells of each request."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    stopping.SAME_INTERRUPT_SECONDS = seconds_of_one_interrupt
    stop = StopRequest()

    def tell():
        while True:
            if stop.asked:
                stop.asked = False
                pipe.send("asked")
            time.sleep(0.005)

    threading.Thread(target=tell, daemon=True).start()
    pipe.send("ready")
    while True:  # a signal interrupts sleep
        ctypes.CDLL(None).sleep(1000)


class Started:
    """A process that has said that it is ready."""

    def __init__(self, function, *args):
        self.pipe, far_end = multiprocessing.get_context("forkserver").Pipe()
        (self.process,) = start_processes(1, function, far_end, *args)
        far_end.close()
        self.hears("ready")

    def hears(self, expected):
        assert self.pipe.poll(DEADLINE)
        assert self.pipe.recv() == expected

    def send(self, *numbers):
        for number in numbers:
            os.kill(self.process.pid, number)


@pytest.fixture
def start():
    started = []

    def one(*args):
        started.append(Started(*args))
        return started[-1]

    yield one
    for each in started:
        each.process.kill()


def test_each_signal_requests_a_stop_at_once_and_ends_nothing_and_one_ctrl_c_may_arrive_twice(start):
    waiting = start(wait_as_in_a_collective, DEADLINE)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        waiting.send(number)
        waiting.hears("asked")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # from the terminal, and from a launcher
        waiting.send(number)
        waiting.hears("asked")


def test_a_second_ctrl_c_exits_at_once_and_another_request_between_changes_nothing(start):
    waiting = start(wait_as_in_a_collective, 0)
    waiting.send(signal.SIGINT)
    waiting.hears("asked")
    waiting.send(signal.SIGTERM)
    waiting.hears("asked")
    waiting.send(signal.SIGINT)
    waiting.process.join(DEADLINE)
    assert waiting.process.exitcode == INTERRUPTED


def test_a_hang_up_that_is_ignored_stays_so(start):
    waiting = start(wait_as_in_a_collective, 0, (signal.SIGHUP,))  # under nohup
    with open(f"/proc/{waiting.process.pid}/status") as status:
        (ignored,) = (line.split()[1] for line in status if line.startswith("SigIgn"))
    assert int(ignored, 16) & 1 << signal.SIGHUP - 1


def compile_something(pipe):
    """Be a process below which a compiler runs, as below torch."""
    os.setsid()
    stop = StopRequest()
    try:
        with stop.interrupting():
            compiler = subprocess.Popen(["sh", "-c", "sleep 1000; true"])
            pipe.send("ready")
            if compiler.wait():
                raise RuntimeError("Error building extension")
    except Stopped as stopped:
        pipe.send(str(stopped))
    pipe.recv()
    pipe.send("heard")


@pytest.mark.parametrize(
    ("send", "number"), [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT), (os.killpg, signal.SIGHUP)]
)
def test_a_request_while_something_is_compiled_ends_the_compiler_and_the_wait(start, send, number):
    """The signal goes to the rank, or to it and its compiler."""
    compiling = start(compile_something)
    compilers = psutil.Process(compiling.process.pid).children(recursive=True)
    assert compilers
    send(compiling.process.pid, number)
    compiling.hears("stopped by a signal before the first step")
    compiling.send(number)
    compiling.pipe.send("")
    compiling.hears("heard")
    compiling.process.join(DEADLINE)
    assert compiling.process.exitcode == 0
    end = time.monotonic() + DEADLINE
    while any(map(is_alive, compilers)):  # one that was sent a signal takes a moment to die
        assert time.monotonic() < end, compilers
        time.sleep(0.02)


def test_the_deadline_is_the_limit_from_the_start_of_the_process_or_the_end_of_a_slurm_job_if_that_is_earlier():
    now = time.time()
    age, soon = now - psutil.Process(os.getpid()).create_time(), {"SLURM_JOB_END_TIME": str(int(now) + 1000)}
    assert not Deadline(None, {}).within(1e9)
    for deadline in (Deadline(age + 1000, {}), Deadline(None, soon), Deadline(10**9, soon)):
        assert deadline.within(1010)
        assert not deadline.within(100)
    assert Deadline(0, soon).within(0)
