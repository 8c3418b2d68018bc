"""With which code every rank leaves, whatever went wrong on whichever rank and when."""

import errno
import itertools
import os
import signal
import socket
import sys
import time
from functools import partial

import pytest
from devices import on_gpus
from ranks import start_processes
from torch.distributed import DistError
from toy import ds_config, write_inputs

from megamoe import pretrain
from megamoe.errors import UserError
from megamoe.launch import exits, watch
from megamoe.launch.exits import FAILED, INTERRUPTED, LOST, REFUSED, leave
from megamoe.launch.rank_info import RANK_ON_HOST
from megamoe.training import distributed
from megamoe.training.step import TrainStep

KILLED = -signal.SIGKILL


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
MOMENTS = {"check": 0, "first step": 1, "later step": 3}


def pretrain_with(fault, moment, failing, words, output):
    """Be a rank of pretrain.py, whose rank `failing` has a fault."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.argv = ["pretrain.py", *words]
    watch.HEARTBEAT_SECONDS, watch.DEAD_SECONDS, watch.READ_SECONDS = 0.2, 1, 1
    if int(os.environ["RANK"]) == failing:
        plant(fault, MOMENTS[moment])
    pretrain.main()


def plant(fault, step):
    steps = iter(range(1, 10))
    train, check = TrainStep.forward_backward, pretrain.Job

    def fail_in_step(*args):
        if next(steps) == step:
            fault()
        return train(*args)

    def fail_in_check(*args, **options):
        if step == 0:
            fault()
        return check(*args, **options)

    TrainStep.forward_backward, pretrain.Job = fail_in_step, fail_in_check


def words_for(folder):
    """A command line."""
    run = write_inputs(folder, ds_config(2))
    return ["--ds_config", run["ds_config"], "--preset", run["preset"], "--data", *run["data"],
            "--run_dir", str(folder / "run"), "--steps", "4", "--eval_interval", "0"]  # fmt: skip


CASES = [
    *itertools.product(["cpu"], [2], TABLE, [0, 1], MOMENTS),
    on_gpus(1, "cuda", 1, fall_over_as_torch_does, 0, "later step"),
    *(on_gpus(2, "cuda", 2, fault, 1, "later step") for fault in (fall_over_as_torch_does, fill_disk, kill)),
]


@pytest.mark.parametrize(("device", "number", "fault", "failing", "moment"), CASES)
def test_all_ranks_leave_with_one_code_for_what_went_wrong_on_one(device, number, fault, failing, moment, tmp_path):
    output = tmp_path / "output"
    words = words_for(tmp_path)
    ranks = start_processes(number, pretrain_with, fault, moment, failing, words, str(output), device=device)
    for rank in ranks:
        rank.join(240)  # an operator may be compiled first
    expected = dict.fromkeys(range(number), TABLE[fault][1]) | {failing: TABLE[fault][0]}
    said = output.read_text()
    assert {number: rank.exitcode for number, rank in enumerate(ranks)} == expected, said
    assert said.count(TABLE[fault][2]) == 1, said
    assert said.count("Traceback") == (fault in (fall_over, fall_over_as_torch_does)), said
    assert ("resume from the last checkpoint" in said) == (fault is not refuse)


def leave_with(code, environment):
    os.environ.update(environment)
    leave(code)


@pytest.mark.parametrize(("code", "torchrun", "expected"), [(75, False, 75), (75, True, 0), (2, True, 2), (0, True, 0)])
def test_the_first_rank_of_a_host_leaves_its_code_and_torchrun_sees_a_stop_as_an_end(
    code, torchrun, expected, tmp_path
):
    note = tmp_path / "note"
    environment = {"MEGAMOE_EXIT_NOTE": str(note), **({"TORCHELASTIC_RUN_ID": "x"} if torchrun else {})}
    ranks = start_processes(2, leave_with, code, environment)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [expected, expected]
    assert note.read_text() == f"{code}\n"


def test_a_second_rank_that_sees_its_own_device_alone_is_not_the_first(tmp_path):
    environment = {"MEGAMOE_EXIT_NOTE": str(tmp_path / "note"), "LOCAL_RANK": "0", RANK_ON_HOST: "1"}
    (rank,) = start_processes(1, leave_with, 2, environment)
    rank.join(60)
    assert rank.exitcode == 2
    assert not (tmp_path / "note").exists()


def test_a_note_that_cannot_be_written_changes_no_code(tmp_path):
    (rank,) = start_processes(1, leave_with, 75, {"MEGAMOE_EXIT_NOTE": str(tmp_path / "gone" / "note")})
    rank.join(60)
    assert rank.exitcode == 75


def pretrain_with_groups_that_never_end(*args):
    exits.END_SECONDS = 0.5
    exits._abort_process_group = exits.dist.destroy_process_group = lambda: time.sleep(600)
    pretrain_with(*args)


@pytest.mark.parametrize(("fault", "code"), [(fall_over, FAILED), (do_nothing, 0)], ids=["bug", "end"])
def test_process_groups_that_never_end_hold_no_rank(fault, code, tmp_path):
    output, words = tmp_path / "output", words_for(tmp_path)
    ranks = start_processes(2, pretrain_with_groups_that_never_end, fault, "later step", 1, words, str(output))
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [code, code]
    assert output.read_text().count("KeyError: 'a bug'") == bool(code)


# --- before the ranks watch each other -------------------------------------------------------------------------------


def launch_wrongly():
    del os.environ["MASTER_PORT"]


def await_a_rank_0_that_never_comes():
    os.environ.update(RANK="1", WORLD_SIZE="2")
    distributed.join = partial(distributed.join, seconds=0.1)


def fail_to(error, name):
    def fail(*args):
        raise error

    setattr(pretrain, name, fail)


AT_THE_START = {
    launch_wrongly: (REFUSED, "error: RANK is 0, but MASTER_PORT is not set; start megamoe by"),
    await_a_rank_0_that_never_comes: (FAILED, "error: rank 1 on "),
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
    rank.join(60)
    code, words = AT_THE_START[fault]
    said = output.read_text()
    assert rank.exitcode == code, said
    assert note.read_text() == f"{code}\n"
    own = said[said.index(words) :]  # torch's log may come first
    assert len(own.splitlines()) == bool(words) or "a bug" in own
    assert ("Traceback" in said) == ("a bug" in said)
