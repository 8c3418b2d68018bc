"""With which code every rank leaves, whatever went wrong on whichever rank and when."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import psutil
import pytest
import stub_rank
from devices import on_gpus
from ranks import DEADLINE, start_processes
from torch.distributed import DistError
from toy import ds_config, write_inputs

from megamoe import pretrain
from megamoe.launch import exits
from megamoe.launch.codes import FAILED, INTERRUPTED, LOST, REFUSED, STOPPED
from megamoe.launch.exits import leave
from megamoe.launch.holders import pid_space
from megamoe.launch.rank_info import RANK_ON_HOST
from megamoe.launch.watch import Intervals, Watch
from megamoe.monitoring.log_files import read_events
from megamoe.training.step import TrainStep
from megamoe.utils.errors import UserError

KILLED = -signal.SIGKILL
QUICK = Intervals(heartbeat=0.1, silent=DEADLINE, read=DEADLINE, launcher=0)


def refuse():
    raise UserError("the corpus is empty; prepare it again.", "the disk is slow; use another.")


def fill_disk():
    raise OSError(errno.ENOSPC, "No space left on device", "runs/log.jsonl")


def fall_over():
    raise KeyError("a bug")


def do_nothing():
    pass


def fall_over_as_torch_does():
    raise RuntimeError("a bug in an operator")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


# What goes wrong: exit codes of the rank where it does and of the other, and what is said of it once. Which of them the
# launch scripts restart is in test_scripts.py.
TABLE = {
    refuse: (
        REFUSED,
        REFUSED,
        "error: the corpus is empty; prepare it again.\nerror: the disk is slow; use another.\n",
    ),
    fill_disk: (FAILED, FAILED, "No space left on device: 'runs/log.jsonl'); resume from the last checkpoint"),
    fall_over: (FAILED, FAILED, "KeyError: 'a bug'"),
    fall_over_as_torch_does: (FAILED, FAILED, "RuntimeError: a bug in an operator"),
    kill: (KILLED, LOST, " died"),
}


def be_rank(fault, moment, failing, words, output, intervals=QUICK):
    """Be a rank of pretrain.py, whose rank `failing` has a fault: with an engine at the moment "engine" only."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.argv = ["pretrain.py", *words]
    pretrain.Watch = partial(Watch, intervals=intervals)
    fails = int(os.environ["RANK"]) == failing
    if moment == "engine":
        if fails:
            plant_in_step(fault, 3)
        pretrain.main()
    if fails and moment == "check":
        stub_rank.check = lambda *args, **options: fault()
    stub_rank.main(lambda step: fault() if fails and step == 3 and moment == "step" else None)


def plant_in_step(fault, step):
    steps = iter(range(1, 10))
    train = TrainStep.forward_backward

    def fail_in_step(*args):
        if next(steps) == step:
            fault()
        return train(*args)

    TrainStep.forward_backward = fail_in_step


def words_for(folder, *more, engine=False, steps=4):
    """A command line; its files are there for a rank with an engine."""
    run = write_inputs(folder, ds_config(2)) if engine else {"ds_config": "ds.json", "preset": "", "data": [""]}
    return ["--ds_config", run["ds_config"], "--preset", run["preset"], "--data", *run["data"],
            "--run_dir", str(folder / "run"), "--steps", str(steps), "--eval_interval", "0", *more]  # fmt: skip


def codes_of(ranks):
    for rank in ranks:
        rank.join(DEADLINE)
    return [rank.exitcode for rank in ranks]


# Each fault on each rank, and at each moment; with an engine there are DeepSpeed's groups to leave too.
CASES = [
    *(
        ("cpu", 2, fault, failing, ("check", "step")[(failing + number) % 2])
        for number, fault in enumerate(TABLE)
        for failing in (0, 1)
    ),
    ("cpu", 2, fall_over_as_torch_does, 1, "engine"),
    on_gpus(1, "cuda", 1, fall_over_as_torch_does, 0, "engine"),
    *(on_gpus(2, "cuda", 2, fault, 1, "engine") for fault in (fall_over_as_torch_does, fill_disk, kill)),
]


@pytest.mark.parametrize(("device", "number", "fault", "failing", "moment"), CASES)
def test_all_ranks_leave_with_one_code_for_what_went_wrong_on_one(device, number, fault, failing, moment, tmp_path):
    output = tmp_path / "output"
    is_real = moment == "engine"
    words = words_for(tmp_path, *(["--ep_size", str(number)] if is_real else []), engine=is_real)
    ranks = start_processes(number, be_rank, fault, moment, failing, words, str(output), device=device)
    expected = dict.fromkeys(range(number), TABLE[fault][1]) | {failing: TABLE[fault][0]}
    assert codes_of(ranks) == list(expected.values()), output.read_text()
    said = output.read_text()
    assert said.count(TABLE[fault][2]) == 1, said
    assert said.count("Traceback") == (fault in (fall_over, fall_over_as_torch_does)), said
    assert ("resume from the last checkpoint" in said) == (fault is not refuse)
    if moment == "step":
        (event,) = [one for one in read_events(tmp_path / "run") if one["event"] != "start"]
        assert event["event"] == ("death" if fault is kill else "error"), event
        assert event["ranks"] == ([failing] if fault is kill else [])
        assert event["reason"] in said


def send(number):
    os.kill(os.getpid(), number)


STALL = r"""error: no rank has made progress for 5 s: rank.* in step 3, reading data"""
ENDS = {  # what happens on rank 1 in step 3, the line that tells of it, and the code of both ranks
    "a signal": (partial(send, signal.SIGTERM), (), r"stopped by a signal after step \d", STOPPED),
    "Ctrl-C": (partial(send, signal.SIGINT), (), r"stopped by a signal after step \d", STOPPED),
    "the time limit": (do_nothing, ("--time_limit", "0:00:01"), "stopped before the time limit after step 1", STOPPED),
    "nothing": (do_nothing, (), "saved .*step_4", 0),
}


@pytest.mark.parametrize("what", ENDS)
def test_both_ranks_end_together_with_a_checkpoint(what, tmp_path):
    event, options, line, code = ENDS[what]
    words = words_for(tmp_path, *options, steps=100_000 if code else 4)
    output = tmp_path / "output"
    ranks = start_processes(2, be_rank, event, "step", 1, words, str(output))
    assert codes_of(ranks) == [code, code], output.read_text()
    said = output.read_text()
    assert len(re.findall(line, said)) == 1, said
    last = re.findall(r"step=(\d+) ", said)[-1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{last}"


def be_rank_below_a_script(script, *args):
    os.environ["MEGAMOE_SCRIPT"] = f"{script},{pid_space()}"
    be_rank(partial(os.kill, script, signal.SIGKILL), *args)


def test_ranks_whose_launch_script_was_killed_save_and_leave(tmp_path):
    words, output = words_for(tmp_path, steps=100_000), tmp_path / "output"
    with subprocess.Popen(["sleep", "300"]) as script:
        ranks = start_processes(2, be_rank_below_a_script, script.pid, "step", 1, words, str(output))
    assert codes_of(ranks) == [STOPPED, STOPPED], output.read_text()


def test_ranks_that_wait_for_one_that_hangs_say_where_each_is(tmp_path):
    words, output = words_for(tmp_path, "--collective_timeout", "5"), tmp_path / "output"
    intervals = replace(QUICK, read=0.1)  # which the one that hangs will not do
    hang = partial(send, signal.SIGSTOP)
    first, second = start_processes(2, be_rank, hang, "step", 1, words, str(output), intervals)
    first.join(DEADLINE)
    psutil.Process(second.pid).resume()
    second.join(DEADLINE)
    said = output.read_text()
    assert (first.exitcode, second.exitcode) == (LOST, LOST), said
    assert len(re.findall(STALL, said)) == 1, said
    assert [one["event"] for one in read_events(tmp_path / "run")] == ["start", "stall"]


def leave_with(code, environment):
    os.environ.update(environment)
    leave(code)


SECOND = {"LOCAL_RANK": "0", RANK_ON_HOST: "1"}  # that sees its own device alone


@pytest.mark.parametrize(
    ("code", "environment", "expected", "noted"),
    [(75, {}, 75, True), (75, {"TORCHELASTIC_RUN_ID": "x"}, 0, True), (2, {"TORCHELASTIC_RUN_ID": "x"}, 2, True),
     (2, SECOND, 2, False)],
)  # fmt: skip
def test_the_first_rank_of_a_host_leaves_its_code_and_torchrun_sees_a_stop_as_an_end(
    code, environment, expected, noted, tmp_path
):
    note = tmp_path / "note"
    assert codes_of(start_processes(1, leave_with, code, {"MEGAMOE_EXIT_NOTE": str(note), **environment})) == [expected]
    assert (note.exists() and note.read_text()) == (noted and f"{code}\n")


def be_rank_whose_groups_never_end(*args):
    exits.END_SECONDS = 0.1
    exits._abort_process_group = exits.dist.destroy_process_group = lambda: time.sleep(600)
    be_rank(*args)


@pytest.mark.parametrize(("fault", "code"), [(fall_over, FAILED), (do_nothing, 0)], ids=["bug", "end"])
def test_process_groups_that_never_end_hold_no_rank(fault, code, tmp_path):
    output, words = tmp_path / "output", words_for(tmp_path)
    ranks = start_processes(2, be_rank_whose_groups_never_end, fault, "step", 1, words, str(output))
    assert codes_of(ranks) == [code, code]
    assert output.read_text().count("KeyError: 'a bug'") == bool(code)


def launch_wrongly():
    del os.environ["MASTER_PORT"]


def fail_to(error, name):
    def fail(*args):
        raise error

    setattr(pretrain, name, fail)


AT_THE_START = {
    launch_wrongly: (REFUSED, "error: RANK is 0, but MASTER_PORT is not set; start megamoe by"),
    partial(fail_to, OSError(errno.ENETUNREACH, "Network is unreachable"), "init_distributed"): (
        FAILED,
        f"error: {socket.gethostname()} failed ([Errno 101] Network is unreachable); see that its network and disks",
    ),
    partial(fail_to, DistError("Broken pipe\nat socket.cpp"), "Watch"): (
        FAILED,
        f"error: {socket.gethostname()} failed (Broken pipe); see that its network and disks answer, and start",
    ),
    partial(fail_to, KeyboardInterrupt(), "init_distributed"): (INTERRUPTED, ""),
    partial(fail_to, KeyError("a bug"), "init_distributed"): (FAILED, "Traceback"),
}


def start_with(fault, output, note):
    os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.environ["MEGAMOE_EXIT_NOTE"] = note
    fault()
    pretrain.main()


@pytest.mark.parametrize("fault", AT_THE_START)
def test_a_rank_that_fails_before_the_others_watch_it_says_why_and_leaves_its_code(fault, tmp_path):
    output, note = tmp_path / "output", tmp_path / "note"
    (rank,) = start_processes(1, start_with, fault, str(output), str(note))
    rank.join(DEADLINE)
    code, words = AT_THE_START[fault]
    said = output.read_text()
    assert rank.exitcode == code, said
    assert note.read_text() == f"{code}\n"
    own = said[said.index(words) :]  # torch's log may come first
    assert len(own.splitlines()) == bool(words) or "a bug" in own
    assert ("Traceback" in said) == ("a bug" in said)
