"""A table of changes becomes runs, lines of results, a table and a picture."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from threading import Lock

import ablate
import pytest
from corpora import build, random_tokens
from ranks import start_processes
from refusals import has, only, refusal, refusals
from toy import PRESET, SHIPPED

from megamoe import pretrain
from megamoe.config.model import ModelConfig
from megamoe.utils.json_files import read_json

DS = SHIPPED / "zero2_fp32.json"
DEADLINE = 240  # seconds, which end a hang


@pytest.fixture
def write(tmp_path):
    """Writes a table of changes of a small preset; returns its path."""
    (tmp_path / "preset.json").write_text(json.dumps(PRESET))
    ds = read_json(DS)
    ds["scheduler"]["params"]["warmup_num_steps"] = 1
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    prefix = build(tmp_path / "train", random_tokens(2000, PRESET["vocab_size"]))

    def write(changes, **others):
        options = {"data": [str(prefix)], "valid_data": str(prefix), "eval_samples": 4, "log_interval": 1}
        table = {
            "preset": str(tmp_path / "preset.json"),
            "ds_config": str(tmp_path / "ds.json"),
            "options": options,
            "changes": changes,
        }
        (tmp_path / "table.json").write_text(json.dumps({**table, **others}))
        return tmp_path / "table.json"

    return write


def read(path, steps=10, ranks=1, seeds=(1,), only=()):
    return ablate.read_table(path, steps, ranks, list(seeds), list(only))


def test_every_change_and_the_baseline_are_trained_with_every_seed(write):
    trials = read(write({"a": {}, "b": {"steps": 7, "ranks": 2}}), seeds=(3, 4))
    assert [(one.name, one.seed, one.steps, one.ranks) for one in trials] == [
        ("baseline", 3, 10, 1),
        ("baseline", 4, 10, 1),
        ("a", 3, 10, 1),
        ("a", 4, 10, 1),
        ("b", 3, 7, 2),
        ("b", 4, 7, 2),
    ]
    assert {one.name for one in read(write({"a": {}, "b": {}}), only=["b"])} == {"b"}


def test_a_change_reaches_the_preset_the_json_and_the_options_and_nothing_else(write):
    change = {
        "preset": {"qk_norm": "head"},
        "ds_config": {"optimizer.params.betas": [0.9, 0.99], "gradient_clipping": None},
        "options": {"seq_len": 8},
    }
    base, changed = read(write({"a": change}))
    assert changed.model == ModelConfig(**PRESET, qk_norm="head")
    assert changed.ds["optimizer"]["params"]["betas"] == [0.9, 0.99]
    assert "gradient_clipping" not in changed.ds
    assert changed.options["seq_len"] == 8
    assert base.model == ModelConfig(**PRESET)
    assert {**base.ds, "scheduler": None} == {**read_json(DS), "scheduler": None}
    assert "seq_len" not in base.options


def test_the_schedule_ends_with_the_run(write):
    assert read(write({}), steps=10)[0].ds["scheduler"]["params"]["total_num_steps"] == 10
    assert read(write({}), steps=None)[0].steps == read_json(DS)["scheduler"]["params"]["total_num_steps"]
    # A constant rate has no end.
    constant = {"warmup_type": "linear", "warmup_num_steps": 1, "warmup_max_lr": 0.01}
    path = write({"a": {"steps": 7}})
    ds = read_json(path.parent / "ds.json")
    (path.parent / "ds.json").write_text(json.dumps({**ds, "scheduler": {"type": "WarmupLR", "params": constant}}))
    assert [(one.steps, one.ds["scheduler"]["params"]) for one in read(path)] == [(10, constant), (7, constant)]
    has(refusals(read, path, None)[0], "baseline", "no end", "--steps")


def test_everything_wrong_in_a_table_is_said_at_once(write):
    path = write(
        {
            "a": {"preset": {"qk_nrm": "head"}},
            "b": {"option": {}},
            "c": {"options": {"seed": 3, "seq_length": 8}},
        }
    )
    problems = refusals(read, path)
    for problem, parts in zip(
        sorted(problems),
        [("a", "qk_nrm", "qk_norm"), ("b", "option", "options"), ("c", "seed", "runner"), ("c", "seq_length")],
        strict=True,
    ):
        has(problem, *parts)
    into_text = {"ds_config": {"optimizer.type.lr": 1}}
    warms_up = {"ds_config": {"scheduler.params.warmup_num_steps": 10}}
    first, second = refusals(read, write({"a": into_text, "b": warms_up}))
    has(first, "a: ds_config", '"type" of optimizer.type.lr', '"AdamW"')
    has(second, "b: ", "warmup_num_steps is 10", "total_num_steps 10")
    has(refusal(read, write({"a": 3})), '"changes.a" is 3', "change it")
    has(refusal(read, write({"a": {}}), 10, 1, (1,), ["aa"]), "aa", "a")
    has(refusal(read, path.parent / "none.json"), "none.json")


def test_what_would_end_a_run_before_its_first_step_is_said_before_any_run(write, tmp_path):
    none = {"options": {"data": [str(tmp_path / "none")]}}
    unfit = {"options": {"ep_size": 2}, "ds_config": {"optimizer.params.beta": [0.9, 0.99]}}
    lines, work = tmp_path / "out.jsonl", tmp_path / "work"
    path = write({"a": none, "b": none, "c": unfit})
    missing, key, size = refusals(ablate.train_all, read(path), lines, work, 1)
    has(missing, "a, b: ", "none.idx", "prepare_data.py")
    has(key, "c: ", "beta", "betas")
    has(size, "c: ", "ep_size is 2", "the 1 ranks", "choose a divisor")
    assert not work.exists()
    # Of runs that have results nothing is asked.
    trials = read(path, only=["a"])
    lines.write_text(json.dumps(ablate.named(trials[0])) + "\n")
    assert ablate.train_all(trials, lines, work, 1) == []
    # A batch that is right for several ranks is.
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    ablate.check_jobs(read(write({"a": {"ds_config": batch}}), ranks=2))


# Stands for a run: says who it is, and that a signal ends it.
RUN = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[2], "w").write("ended"), os._exit(0)))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open(sys.argv[1], "w").write(str(os.getpid()))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
signal.pause()
"""


def written_to(pipe):
    """The first that is written there."""
    file = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([file], [], [], DEADLINE)[0], f"nothing has been written to {pipe.name}"
        return os.read(file, 100).decode()
    finally:
        os.close(file)


def ablate_runs_that_wait(words, run):
    sys.argv = words
    ablate.ROOT = run.parent.parent
    ablate.command_line = lambda trial, folder: [str(run.parent / "begun"), str(run.parent / "ended")]
    ablate.check_jobs = lambda trials: None
    ablate.main()


def test_sigterm_ends_the_runs_too(write, tmp_path):
    run = tmp_path / "megamoe" / "pretrain.py"
    run.parent.mkdir()
    run.write_text(RUN)
    begun, ended = run.parent / "begun", run.parent / "ended"
    os.mkfifo(begun)
    os.mkfifo(ended)
    words = ["ablate.py", str(write({})), "--work", str(tmp_path / "work")]
    (process,) = start_processes(1, ablate_runs_that_wait, words, run)
    child = int(written_to(begun))
    try:
        process.terminate()
        assert written_to(ended) == "ended"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.join(DEADLINE)
    assert process.exitcode == 128 + signal.SIGTERM


def test_wrong_options_are_refused_before_anything_trains(monkeypatch, tmp_path):
    words = ["ablate.py", "table.json", "--steps", "0", "--ranks", "0", "--parallel", "-1"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "none" / "out.jsonl")])
    *problems, out = refusals(ablate.parse)
    for problem, part in zip(problems, ("--steps is 0", "--ranks is 0", "--parallel is -1"), strict=True):
        has(problem, part, "at least 1")
    has(out, "--out is", "none", "make it")


def line(name, seed, bits, steps=10, ranks=1):
    values = {"running_max_vio": 0.1, "highest_max_vio": 0.2, "tokens_per_second": 1000.0, "loss": 3.0, "change": {}}
    size = {"steps": steps, "ranks": ranks}
    return {"name": name, "seed": seed, **size, "held_out": {"loss": 2.0, "bits_per_byte": bits}, **values}


def test_the_table_gives_mean_spread_worst_and_difference_to_the_baseline_of_as_many_steps():
    bits = {"baseline": [2.5, 2.7], "a": [2.4, 2.5]}
    lines = [line(name, seed, value) for name, values in bits.items() for seed, value in enumerate(values)]
    others = line("a", 1, 2.9, steps=99), line("a", 1, 3.0, ranks=2)
    head, first, second, *alone = ablate.table_of(ablate.groups_of([*lines, *others])).splitlines()
    assert head.split()[:8] == ["change", "steps", "ranks", "seeds", "result", "spread", "change", "worst"]
    spread = f"{stdev(bits['a']):.4f}"
    difference = f"{mean(bits['a']) - mean(bits['baseline']):+.4f}"
    assert first.split()[:8] == ["a", "10", "1", "2", "2.4500", spread, difference, "2.5000"]
    assert second.split()[:7] == ["baseline", "10", "1", "2", "2.6000", f"{stdev(bits['baseline']):.4f}", "+0.0000"]
    # One seed has no spread, and without a baseline of its steps and ranks there is no difference.
    assert [row.split()[:6] for row in alone] == [
        ["a", "99", "1", "1", "2.9000", "2.9000"],
        ["a", "10", "2", "1", "3.0000", "3.0000"],
    ]
    # A result without bytes is compared by its loss.
    assert [ablate.measure_of({"loss": 3.0, "held_out": held_out}) for held_out in ({"loss": 2.0}, {})] == [2.0, 3.0]


def pretrain_here(words, output):
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.argv = words
    pretrain.main()


@pytest.fixture
def forked_runs(monkeypatch):
    """Runs of one rank are forked, with their imports done."""
    one_at_a_time = Lock()

    def run(command, stdout, **_):
        assert Path(command[1]) == Path(pretrain.__file__)
        with one_at_a_time:
            (process,) = start_processes(1, pretrain_here, command[1:], stdout.name)
        process.join(DEADLINE)
        assert process.exitcode is not None, f"{command} hangs"
        return subprocess.CompletedProcess(command, process.exitcode)

    monkeypatch.setattr(ablate.subprocess, "run", run)


def test_runs_are_lines_that_the_next_call_does_not_repeat(write, tmp_path, forked_runs):
    path, lines, work = (
        write({"wide": {"preset": {"intermediate_size": 64}}}),
        tmp_path / "out.jsonl",
        tmp_path / "work",
    )
    trials = read(path, steps=3)
    assert ablate.train_all(trials, lines, work, parallel=2) == []
    found = {one["name"]: one for one in ablate.read_lines(lines)}
    assert found.keys() == {"baseline", "wide"}
    log = ablate.read_log(work / "wide-1" / "run")
    assert found["wide"]["loss"] == log["train"][-1]["loss"]
    assert found["wide"]["held_out"]["loss"] == log["valid"][-1]["loss"]
    assert found["wide"]["tokens"] == 3 * 2 * PRESET["max_position_embeddings"]
    assert found["wide"]["parameters"] > found["baseline"]["parameters"]
    assert found["wide"]["change"] == {"preset": {"intermediate_size": 64}}
    assert not (work / "wide-1" / "run" / "checkpoints").exists()
    before = lines.read_bytes()
    assert ablate.train_all(trials, lines, tmp_path / "other", parallel=2) == []
    assert lines.read_bytes() == before
    assert not (tmp_path / "other").exists()
    # Nor are results of another recipe taken for those of the table.
    options = {"data": [str(tmp_path / "train")], "seq_len": 8}
    changed = read(write({"wide": {"preset": {"intermediate_size": 64}}}, options=options), steps=3)
    problem = refusal(ablate.train_all, changed, lines, tmp_path / "other", 2)
    has(problem, str(lines), "results of baseline, wide with another", "--out")
    # A run on other ranks has another batch.
    assert read(path, steps=3, ranks=2)[0].key != read(path, steps=3)[0].key == trials[0].key


def test_a_run_that_fails_is_named_with_its_reason_and_has_no_line(write, tmp_path, forked_runs):
    (trial,) = read(write({"a": {}}), steps=3, only=["a"])
    build(tmp_path / "train", [PRESET["vocab_size"]] * 2000)
    problem = only(ablate.train_all([trial], tmp_path / "out.jsonl", tmp_path / "work", parallel=1))
    has(problem, "a, seed 1", "code 2", f"token id {PRESET['vocab_size']}", "output.txt")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_picture_has_a_row_for_every_change(tmp_path):
    ablate.draw(ablate.groups_of([line("baseline", 1, 2.5), line("a", 1, 2.4), line("a", 2, 2.3)]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
