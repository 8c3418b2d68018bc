"""The parts of `make gpu`, each by itself."""

import json

import check_gpu
import pytest

from megamoe.utils.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs parts whose speed is a number; returns whether all is well, and the file."""
    device = {"name": "GPU", "count": 1, "driver": "1", "cuda": "13"}
    monkeypatch.setattr(check_gpu, "refuse_unusable_gpus", lambda: None)
    monkeypatch.setattr(check_gpu, "describe_device", lambda: device)
    monkeypatch.setattr(check_gpu, "resolved_file", lambda *_: "ds.json")
    measured = {"turns": [], "failure": None}
    monkeypatch.setattr(check_gpu, "measure_speed", lambda word, *_: (word, measured))
    page = tmp_path / "performance.md"
    page.write_text("<!-- begin of tools/dev/gpu_table.py --><!-- end of tools/dev/gpu_table.py -->")

    def call(*parts):
        is_well = check_gpu.run(tmp_path, page, parts)
        return is_well, json.loads((tmp_path / "gpu-gpu-x1.json").read_text()), page.read_text()

    return call


def test_a_part_that_fails_leaves_the_others_and_is_named(run, monkeypatch):
    def fail():
        raise UserError("pytest ended with code 3")

    monkeypatch.setattr(check_gpu, "run_checks", fail)
    is_well, found, table = run(*check_gpu.PARTS)
    assert not is_well
    assert list(found["speed"]) == list(check_gpu.CONTENDERS)
    assert found["failures"] == {"checks": "pytest ended with code 3"}
    assert "checks failed." in table


def test_a_part_by_itself_keeps_what_others_have_written(run, monkeypatch):
    monkeypatch.setattr(check_gpu, "run_checks", lambda: [check_gpu.Check("a", "passed", 1.0)])
    assert run("megamoe:1")[0]
    is_well, found, _ = run("checks")
    assert is_well
    assert list(found["speed"]) == ["megamoe:1"]
    assert [check["name"] for check in found["checks"]] == ["a"]
