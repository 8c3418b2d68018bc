"""The operators that DeepSpeed compiles: whoever was killed while it compiled keeps no later start waiting."""

import multiprocessing
import os
from unittest import mock

import pytest
from engines import make
from ranks import run_new_ranks, start_processes
from refusals import has, refusal
from toy import ds_config, recipe_of

from megamoe.training import operators

DEADLINE = 240  # seconds, which end a hang
OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def compiler(pipe, folder, how):
    """Take the turn to compile, which leaves torch's `lock` in the folder for as long as it takes: with "hold", until
    something comes through the pipe. With "meet", load what is compiled, until three do."""
    lock = folder / "lock"

    def load():
        if how == "meet":
            pipe.send("meets")
            pipe.recv()
            return
        assert not lock.exists(), "torch waits for it without an end"
        with open(lock, "x"):
            pipe.send("begun")
            if how == "hold":
                pipe.recv()
            lock.unlink()
        (folder / "cpu_adam.so").touch()

    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder.parent)
    operators.print = lambda line, **_: pipe.send(line)
    operators.load_in_turn("cpu_adam", load)
    pipe.send("done")


@pytest.fixture
def folder(tmp_path):
    """Where torch keeps the operator."""
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam"


@pytest.fixture
def start(folder):
    """Starts a compiler; gives its process and the pipe to it."""
    processes = []

    def new(how=""):
        pipe, far_end = multiprocessing.Pipe()
        (process,) = start_processes(1, compiler, far_end, folder, how)
        far_end.close()
        processes.append(process)
        return process, pipe

    yield new
    for process in processes:
        process.kill()
        process.join()


def read(pipe):
    assert pipe.poll(DEADLINE), "the compiler hangs"
    return pipe.recv()


def read_until(pipe, text):
    lines = [read(pipe)]
    while lines[-1] != text:
        lines.append(read(pipe))
    return lines


@pytest.mark.parametrize("compiled", [False, True])
def test_a_lock_whose_holder_is_killed_is_removed_by_the_one_that_waits(compiled, start, folder):
    if compiled:  # it is killed while it loads that, or compiles again
        (folder / "cpu_adam.so").touch()
    killed, pipe = start("hold")
    read_until(pipe, "begun")
    _, second = start()
    assert read(second).startswith("waiting")
    killed.kill()
    killed.join()
    assert (folder / "lock").exists()
    lines = read_until(second, "done")
    compiling = [f"compiling cpu_adam, once on this host, in {folder}; this takes minutes"]
    assert lines == ["begun", "done"] if compiled else [*compiling, "begun", "done"]
    assert not (folder / "lock").exists()


def test_a_start_says_that_it_waits_and_goes_on_when_the_other_is_done(start, folder):
    _, pipe = start("hold")
    read_until(pipe, "begun")
    _, second = start()
    assert read(second) == f"waiting for another process, which compiles or loads cpu_adam in {folder}"
    pipe.send("go on")
    assert "compiling" not in "".join(read_until(second, "done"))  # it is compiled


def test_a_lock_of_another_program_is_left_alone_until_it_is_old(start, folder):
    read_until(start()[1], "done")
    (folder / "lock").touch()
    _, pipe = start()
    assert read(pipe) == f"waiting for another process, which compiles or loads cpu_adam in {folder}"
    assert (folder / "lock").exists()
    os.utime(folder / "lock", (0, 0))
    assert read_until(pipe, "done")[-2:] == ["begun", "done"]


def test_all_ranks_load_what_is_compiled_at_the_same_time(start, folder):
    (folder / "cpu_adam.so").touch()
    pipes = [start("meet")[1] for _ in range(3)]
    assert [read(pipe) for pipe in pipes] == ["meets"] * 3


def test_an_optimizer_has_the_operator_that_deepspeed_takes():
    for kind, params, zero, builder in (
        ("AdamW", {"torch_adam": True}, {"stage": 2}, None),
        ("AdamW", {"torch_adam": True}, OFFLOADED, None),
        ("AdamW", {}, {"stage": 2}, "FusedAdamBuilder"),
        ("Adam", {}, OFFLOADED, "CPUAdamBuilder"),
        ("Lion", {}, {"stage": 1}, "FusedLionBuilder"),
        ("Lion", {}, OFFLOADED, "CPULionBuilder"),
    ):
        ds = ds_config(2, optimizer={"type": kind, "params": params}, zero_optimization=zero)
        assert recipe_of(ds).operator_builder == builder


def operators_of(optimizer):
    """What an offloading engine of a new process has loaded in turn, and what DeepSpeed has loaded in all."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    with mock.patch.object(operators, "load_in_turn", side_effect=operators.load_in_turn) as in_turn:
        make(1, optimizer=optimizer, zero_optimization=OFFLOADED)
    return [one.args[0] for one in in_turn.call_args_list], list(OpBuilder._loaded_ops)


@pytest.mark.parametrize(("params", "loaded"), [({"torch_adam": True}, []), ({}, ["cpu_adam"])])
def test_an_engine_loads_the_operator_that_it_uses_in_turn_and_no_other(params, loaded):
    assert run_new_ranks(1, operators_of, {"type": "AdamW", "params": params}) == [(loaded, loaded)]


def test_a_folder_for_what_is_compiled_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    problem = refusal(operators.load_in_turn, "cpu_adam", pytest.fail)
    has(problem, f"{tmp_path}/file", "cannot be written and locked (Not a directory)", "set TORCH_EXTENSIONS_DIR to")


def test_a_host_that_cannot_compile_is_told_what_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    problem = refusal(operators.load_in_turn, "cpu_adam", pytest.fail)
    has(problem, "DeepSpeed compiles cpu_adam on this host, where the C++ compiler /bin/false compiles nothing", "CXX")
