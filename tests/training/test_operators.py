"""The operators that DeepSpeed compiles: whoever was killed while it compiled keeps no later start waiting."""

import fcntl
import os
import re
import subprocess
import sys

import pytest
from engines import make
from ranks import run_new_ranks

from megamoe.ds_config import operator_builder
from megamoe.errors import UserError
from megamoe.training import operators

OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}

# Takes its turn to compile, which leaves torch's `lock` in the folder for as long as it takes.
COMPILER = """
import pathlib, sys, time
from megamoe.training import operators
folder = pathlib.Path(sys.argv[1])
def load():
    lock = folder / "lock"
    for _ in range(50):
        if not lock.exists():
            break
        time.sleep(0.1)
    else:
        sys.exit("torch waits like this without an end")
    file = open(lock, "x")
    print("begun", flush=True)
    if sys.argv[2] == "hold":
        sys.stdin.readline()
    lock.unlink()
    (folder / "cpu_adam.so").touch()
operators.QUIET_SECONDS, operators.MOST_SECONDS = 0, 30
operators.load_in_turn("cpu_adam", folder, load)
print("done", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    processes = []

    def compiler(how=""):
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}  # or DeepSpeed says that it finds no other
        words = [sys.executable, "-c", COMPILER, str(tmp_path), how]
        processes.append(
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
        return processes[-1]

    yield compiler
    for process in processes:
        process.kill()
        process.communicate()


def read_until(process, text):
    lines = []
    while not lines or (lines[-1] != text and lines[-1]):
        lines.append(process.stdout.readline().strip())
    assert lines[-1] == text, lines
    return lines


def test_a_lock_whose_holder_was_killed_is_removed_by_the_next_start(start, tmp_path):
    killed = start("hold")
    read_until(killed, "begun")
    killed.kill()
    killed.wait()
    assert (tmp_path / "lock").exists()
    after = start()
    lines = read_until(after, "done")
    assert lines[0] == f"compiling cpu_adam, once on this host, in {tmp_path}; this takes minutes"
    assert not (tmp_path / "lock").exists()


def test_a_start_says_for_whom_it_waits_and_goes_on_when_that_one_is_done(start):
    first = start("hold")
    read_until(first, "begun")
    second = start()
    waiting = second.stdout.readline()
    assert re.match(rf"waiting for process {first.pid} on \S+, which compiles cpu_adam in /", waiting)
    first.stdin.write("\n")
    first.stdin.flush()
    assert "compiling" not in "".join(read_until(second, "done"))  # it is compiled


def test_a_lock_that_a_process_of_this_host_has_open_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operators, "QUIET_SECONDS", 0)
    monkeypatch.setattr(operators, "MOST_SECONDS", 0.5)
    hold = "import sys; file = open(sys.argv[1], 'x'); print(flush=True); input()"
    words = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} on this host compiles cpu_adam in .* already"):
            operators.load_in_turn("cpu_adam", tmp_path, pytest.fail)
        other.communicate(b"\n")
    assert f"waiting for process {other.pid} on this host, which compiles cpu_adam in" in capsys.readouterr().out
    assert (tmp_path / "lock").exists()


def test_a_compiler_that_has_outlived_its_rank_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "MOST_SECONDS", 0.5)
    (tmp_path / "lock").touch()
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as ninja:
        with pytest.raises(UserError, match=f"process {ninja.pid} on this host"):
            operators.load_in_turn("cpu_adam", tmp_path, pytest.fail)
        ninja.kill()
    operators.load_in_turn("cpu_adam", tmp_path, lambda: None)
    assert not (tmp_path / "lock").exists()


def test_what_is_compiled_is_loaded_beside_others_that_load_it(start, tmp_path):
    with open(tmp_path / "holder", "a+") as file:
        fcntl.lockf(file, fcntl.LOCK_SH)
        read_until(start(), "done")


@pytest.mark.parametrize(
    ("optimizer", "params", "zero", "builder"),
    [
        ("AdamW", {"torch_adam": True}, {"stage": 2}, None),
        ("AdamW", {"torch_adam": True}, OFFLOADED, None),
        ("AdamW", {}, {"stage": 2}, "FusedAdamBuilder"),
        ("Adam", {}, OFFLOADED, "CPUAdamBuilder"),
        ("Lion", {}, {"stage": 1}, "FusedLionBuilder"),
        ("Lion", {}, OFFLOADED, "CPULionBuilder"),
        ("Unheard", {}, OFFLOADED, None),
    ],
)
def test_an_optimizer_has_the_operator_that_deepspeed_takes(optimizer, params, zero, builder):
    ds = {"optimizer": {"type": optimizer, "params": params}, "zero_optimization": zero}
    assert operator_builder(ds) == builder


def operators_of(changes):
    """The operators that an engine has loaded in turn, and those that DeepSpeed has loaded in all."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    in_turn, load_in_turn = [], operators.load_in_turn

    def recorded(name, folder, load):
        in_turn.append(name)
        load_in_turn(name, folder, load)

    operators.load_in_turn = recorded
    make(1, **changes)
    return in_turn, list(OpBuilder._loaded_ops)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "AdamW", "params": {"torch_adam": True}}, []),
        ({"type": "AdamW", "params": {}}, ["cpu_adam"]),
        ({"type": "Lion", "params": {}}, ["cpu_lion"]),
    ],
)
def test_an_engine_loads_the_operator_that_it_uses_in_turn_and_no_other(optimizer, expected):
    zero = OFFLOADED if expected else {"stage": 2}
    changes = {"optimizer": optimizer, "zero_optimization": zero}
    assert run_new_ranks(1, operators_of, changes) == [(expected, expected)]
