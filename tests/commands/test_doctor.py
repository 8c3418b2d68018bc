"""megamoe doctor: whether a run fits on this host, in which words and with which code."""

import json
from collections import namedtuple

import psutil
import pytest
from toy import ds_of_samples, write_inputs

from megamoe.commands import doctor as command
from megamoe.commands.doctor import checkpoints_of, doctor
from megamoe.commands.options import Doctor
from megamoe.config.precision import by_rates
from megamoe.config.run import RunConfig
from megamoe.planning import planner
from megamoe.utils import host_memory

Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture
def examined(monkeypatch, tmp_path, capsys):
    """What doctor finds for a toy run, by what it is of, and its exit code."""
    monkeypatch.setattr(planner, "measured_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(planner, "measured_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(command, "precision_of", lambda device: by_rates(1e12, 3e12))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    inputs = write_inputs(tmp_path, ds_of_samples(4))

    def examine(**options):
        try:
            doctor(Doctor(**{**inputs, "run_dir": str(tmp_path / "run"), "ranks": 2, **options}))
            code = 0
        except SystemExit as end:
            code = end.code
        lines = capsys.readouterr().out.splitlines()
        return {line.split(": ")[1].split(" for ")[0]: line for line in lines}, code

    return examine


def test_what_fits_is_ok_and_what_does_not_is_an_error_with_code_2(examined, tmp_path, monkeypatch):
    found, code = examined(json_file=tmp_path / "found.json")
    assert code == 0
    assert found["precision"].startswith("ok: precision: fp32: GEMMs run at 1 TFLOP/s in bf16 and at 3 TFLOP/s in fp32")
    assert found["memory"].startswith("ok: ")
    records = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert {one["severity"] for one in records} <= {"ok", "warning"}
    assert len(records) == len(found)

    host = psutil.virtual_memory()._replace(total=10**6, available=10**6)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: host)
    found, code = examined()
    assert code == 2
    assert found["memory"].startswith("error: ")
    assert found["memory"].endswith("choose a smaller --preset (tiny-plus) or micro-batch, or more hosts.")


def test_the_disk_must_have_room_for_the_checkpoints_that_a_run_keeps_and_the_next(examined, monkeypatch):
    size = 12 * 34_400  # the masters of the parameters, and both moments
    for free, options, severity in (
        (3 * size, {}, "ok"),
        (3 * size - 1, {}, "warning"),
        (2 * size, {"keep_last": 1}, "ok"),
        (2 * size - 1, {"keep_last": 1}, "error"),
    ):
        monkeypatch.setattr(command.shutil, "disk_usage", lambda path, free=free: Usage(free, 0, free))
        found, code = examined(steps=30, save_interval=10, **options)
        assert found["disk"].startswith(severity), options
        assert "of 403.1 KiB, predicted" in found["disk"]
        assert code == (2 if severity == "error" else 0)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"steps": 100, "save_interval": 0}, 1),
        ({"steps": 101, "save_interval": 10}, 11),
        ({"steps": 100, "save_interval": 10, "keep_last": 2}, 3),
        ({"steps": 100, "save_interval": 10, "keep_last": 2, "keep_every": 50}, 5),
        ({"save_interval": 10}, 4),  # of the 40 steps of the DeepSpeed JSON
        ({"schedule_steps": 50, "save_interval": 10}, 5),
    ],
)
def test_a_run_has_so_many_checkpoints_at_most(options, count):
    assert checkpoints_of(RunConfig(**options), 40) == count


def test_what_is_wrong_with_the_configuration_the_data_and_the_port_is_among_the_findings(examined, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(command, "is_free", lambda port: port != 1)
    found, code = examined(ep_size=3, data=["none"])
    assert code == 2
    assert "ep_size is 3" in found["configuration"]
    assert found["files"].startswith("error: files: none.bin, none.idx absent; give --data")
    assert found["MASTER_PORT"].startswith("error: MASTER_PORT: 1, needed: a free port; leave it out.")
