"""Console line, JSON lines, and a sink that fails."""

import json
import math
from unittest.mock import Mock

import pytest

from megamoe.monitoring.log_files import read_log
from megamoe.monitoring.sinks import SinkGroup, make_sinks


def record(step=10, **changes):
    values = {
        "step": step,
        "loss": 10.964131,
        "lr": 1.5e-05,
        "tokens_per_second": 5321.6,
        "mfu": 0.4321,
        "max_vio": 1.234,
        "running_max_vio": 0.567,
        "worst_running_max_vio": 0.765,
        "grad_norm": 2.345,
        "memory_gib": 3.456,
        "skipped_steps": 0,
        "seconds_left": 3723.4,
    }
    return {**values, **changes}


def log(sinks, kind, values):
    sinks.log_scalars(kind, values["step"], {name: value for name, value in values.items() if name != "step"})


def open_sinks(folder, first_step):
    sinks = SinkGroup(make_sinks({"tensorboard": {"folder": folder / "tensorboard"}}))
    sinks.open(folder, first_step, {})
    return sinks


def logged(folder, *records):
    sinks = open_sinks(folder, 0)
    for one in records:
        log(sinks, "train", one)
    sinks.close()


PARTS = {"balance_loss": 1.0234567, "router_z_loss": 3.14159, "mtp_loss": 5.2}


def test_the_console_line_is_that_of_a_step_with_what_it_has_of_parts_and_skipped_steps(tmp_path, capsys):
    later = record(lr=1.66666667e-7, seconds_left=360061)
    logged(tmp_path, record(), record(20, skipped_steps=3, lr=0.00149983333, **PARTS), later)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == (
        "step=10 avg_loss=10.9641 lr=1.5e-05 tok/s=5322 mfu=43.2% max_vio=1.23 running_max_vio=0.57 grad_norm=2.35 "
        "mem=3.46GiB left=1:02:03"
    )
    assert second.startswith("step=20 avg_loss=10.9641 balance=1.023 router_z=3.142 mtp=5.2 lr=0.00149983 ")
    assert second.endswith(" skipped=3")
    assert " lr=1.66667e-07 " in third
    assert third.endswith(" left=100:01:01")


def test_an_evaluation_is_said_with_bits_per_byte_where_they_are_known(tmp_path, capsys):
    sinks = open_sinks(tmp_path, 0)
    log(sinks, "valid", {"step": 500, "loss": 2.34567, "tokens": 4096, "bits_per_byte": 1.23456})
    log(sinks, "valid", {"step": 600, "loss": 2.1, "tokens": 4096})
    log(sinks, "valid", {"step": 700, "loss": 2.1, "tokens": 4096, "code_loss": 1.5, "arc_acc": 0.25})
    log(sinks, "valid", {"step": 800, "arc_acc": 0.5})
    sinks.close()
    assert capsys.readouterr().out.splitlines() == [
        "step=500 valid_loss=2.3457 bits_per_byte=1.2346 tokens=4096",
        "step=600 valid_loss=2.1000 tokens=4096",
        "step=700 valid_loss=2.1000 tokens=4096 code_loss=1.5000 arc_acc=0.2500",
        "step=800 arc_acc=0.5000",
    ]


def test_the_log_holds_every_number_unrounded_and_no_line_about_the_run(tmp_path, capsys):
    sinks = open_sinks(tmp_path, 0)
    valid = {"step": 20, "loss": 2.3456789, "tokens": 4096, "bits_per_byte": 1.25}
    sinks.log_text(0, "tiny: 5 parameters")
    log(sinks, "train", record())
    log(sinks, "valid", valid)
    assert read_log(tmp_path) == {"train": [record()], "valid": [valid], "samples": []}  # on disk before the run ends
    log(sinks, "train", record(step=20, loss=9.5, **PARTS))
    sinks.close()
    assert read_log(tmp_path) == {
        "train": [record(), record(step=20, loss=9.5, **PARTS)],
        "valid": [valid],
        "samples": [],
    }
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kinds == ["train", "valid", "train"]
    assert capsys.readouterr().out.startswith("tiny: 5 parameters\nstep=10 ")


def test_what_a_resumed_run_left_behind_is_not_read_back(tmp_path):
    logged(tmp_path, record(10, max_vio=math.nan), record(20, loss=5.0), record(30, loss=4.0))
    logged(tmp_path, record(15, loss=6.0), record(20, loss=5.5), record(40, loss=3.5))
    rows = read_log(tmp_path)["train"]
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 10.964131), (15, 6.0), (20, 5.5), (40, 3.5)]
    assert math.isnan(rows[0]["max_vio"])  # of a step that was not balanced
    sinks = open_sinks(tmp_path, 20)
    log(sinks, "valid", {"step": 21, "loss": 2.0})
    log(sinks, "train", record(30, loss=3.0))
    sinks.close()
    found = read_log(tmp_path)
    assert [row["step"] for row in found["train"]] == [10, 15, 20, 30]
    assert [row["step"] for row in found["valid"]] == [21]


def test_a_log_torn_in_its_last_line_is_read_up_to_there_and_written_on_after_it(tmp_path):
    logged(tmp_path, record(10), record(20))
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-25])
    assert read_log(tmp_path)["train"] == [record(10)]
    logged(tmp_path, record(20, loss=3.0), record(30))
    assert read_log(tmp_path)["train"] == [record(10), record(20, loss=3.0), record(30)]


@pytest.mark.parametrize("at", ["open", "log_text", "close"])
def test_a_sink_that_fails_is_named_once_and_the_others_go_on(tmp_path, capsys, at):
    broken, kept = Mock(), Mock()
    getattr(broken, at).side_effect = OSError(28, "No space left on device")
    sinks = SinkGroup([broken, kept])
    sinks.open(tmp_path, 0, {})
    for step in (10, 20):
        log(sinks, "train", record(step))
        sinks.log_text(step, "a line")
    sinks.close()
    for sink in (broken, kept):  # a disk may have room again
        assert [call.args[1] for call in sink.log_scalars.call_args_list] == [10, 20]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: Mock failed ([Errno 28] No space left on device); training continues."
