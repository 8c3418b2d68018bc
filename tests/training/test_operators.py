"""The operators that DeepSpeed compiles: whoever was killed while it compiled keeps no later start waiting."""

import os
import re
import subprocess
import sys

import pytest
from engines import make
from ranks import run_new_ranks
from refusals import has, refusal

from megamoe.ds_config import operator_builder
from megamoe.errors import UserError
from megamoe.training import operators

OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}

# Takes its turn to compile, which leaves torch's `lock` in the folder for as long as it takes.
COMPILER = """
import os, pathlib, sys, time
from megamoe.training import operators
folder = pathlib.Path(sys.argv[1])
def meet():
    (folder / f"in-{os.getpid()}").touch()
    for _ in range(200):
        if len(list(folder.glob("in-*"))) == 3:
            return
        time.sleep(0.1)
    sys.exit("the others do not load at the same time")
def load():
    if sys.argv[2] == "meet":
        return meet()
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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_lock_whose_holder_was_killed_is_removed_by_the_next_start(compiled, start, tmp_path):
    if compiled:  # it is killed while it loads that, or compiles anew
        (tmp_path / "cpu_adam.so").touch()
    killed = start("hold")
    read_until(killed, "begun")
    killed.kill()
    killed.wait()
    assert (tmp_path / "lock").exists()
    after = start()
    lines = read_until(after, "done")
    compiling = [f"compiling cpu_adam, once on this host, in {tmp_path}; this takes minutes"]
    assert lines == ["begun", "done"] if compiled else [*compiling, "begun", "done"]
    assert not (tmp_path / "lock").exists()


def test_a_start_says_for_whom_it_waits_and_goes_on_when_that_one_is_done(start):
    first = start("hold")
    read_until(first, "begun")
    second = start()
    waiting = second.stdout.readline()
    assert re.match(rf"waiting for process {first.pid} on \S+, which compiles or loads cpu_adam in /", waiting)
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
        with pytest.raises(
            UserError, match=f"process {other.pid} on this host compiles or loads cpu_adam in .* already"
        ):
            operators.load_in_turn("cpu_adam", tmp_path, pytest.fail)
        other.communicate(b"\n")
    assert (
        f"waiting for process {other.pid} on this host, which compiles or loads cpu_adam in" in capsys.readouterr().out
    )
    assert (tmp_path / "lock").exists()


def test_a_compiler_that_has_outlived_its_rank_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "MOST_SECONDS", 0.5)
    (tmp_path / "lock").touch()
    (tmp_path / "holder").write_text("process 1 on h1\n")  # the rank
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as ninja:
        with pytest.raises(UserError, match=f"process {ninja.pid} on this host"):
            operators.load_in_turn("cpu_adam", tmp_path, pytest.fail)
        ninja.kill()
    operators.load_in_turn("cpu_adam", tmp_path, lambda: None)
    assert not (tmp_path / "lock").exists()


def test_a_lock_of_another_program_that_cannot_be_seen_is_left_alone_until_it_is_old(start, tmp_path):
    read_until(start(), "done")  # leaves nothing that would make the lock ours
    lock = tmp_path / "lock"
    lock.touch()
    waits = start()
    said = waits.stdout.readline()
    assert said.startswith("waiting for a process that cannot be seen from here, which compiles or loads cpu_adam in /")
    assert lock.exists()
    os.utime(lock, (0, 0))
    read_until(waits, "done")
    assert not lock.exists()


def test_all_ranks_load_what_is_compiled_at_the_same_time(start, tmp_path):
    (tmp_path / "cpu_adam.so").touch()
    for rank in [start("meet") for _ in range(3)]:
        assert read_until(rank, "done") == ["done"]
    assert (tmp_path / "holder").read_text() == ""


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


@pytest.mark.parametrize(
    ("lacking", "parts"),
    [
        ({"CXX": "/none/c++ -O2"}, ["no C++ compiler /none/c++ -O2; install one", "or set CXX."]),
        ({"include": "/none"}, ["no /none/Python.h; install Python's headers"]),
    ],
)
def test_a_host_that_cannot_compile_is_told_what_it_lacks(lacking, parts, monkeypatch):
    if "CXX" in lacking:
        monkeypatch.setenv("CXX", lacking["CXX"])
    else:
        monkeypatch.setattr(operators.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(operators.sysconfig, "get_path", lambda name: lacking[name])
    has(
        refusal(operators.check_compiler, "cpu_adam"),
        "DeepSpeed compiles cpu_adam on this host, where there is",
        *parts,
    )


def test_a_folder_for_what_is_compiled_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    problem = refusal(operators.build_folder, "cpu_adam")
    has(problem, f"{tmp_path}/file", "cannot be written (Not a directory)", "cpu_adam", "set TORCH_EXTENSIONS_DIR to")
