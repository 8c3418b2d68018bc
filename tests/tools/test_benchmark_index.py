"""The index of ranks that are not there."""

import runpy
import sys
from pathlib import Path

import pytest
from engines import CONFIG, train_and_save
from ranks import run_ranks
from toy import ds_config

from megamoe.checkpoint.index import BUFFER, read_index
from megamoe.planning.sharding import parameter_groups, read_setup

TOOL = Path(__file__).parent.parent.parent / "tools" / "benchmark_index.py"


@pytest.mark.parametrize(("ranks", "ep_size"), [(2, 2), (4, 2)])
def test_its_slices_are_those_that_an_engine_saves(tmp_path, ranks, ep_size):
    run_ranks(ranks, train_and_save, tmp_path / "checkpoints", ep_size)
    saved = read_index(tmp_path / "checkpoints" / "step_3")
    setup = read_setup(CONFIG, ds_config(1), ranks, ep_size, 16, on_cpu=True)
    slices_of = runpy.run_path(str(TOOL))["slices_of"]
    for rank in range(ranks):
        expected = {(one.name, one.start, one.count) for one in slices_of(setup, parameter_groups(setup), rank)}
        slices = saved.files[f"rank_{rank:05d}.safetensors"].slices
        assert {(one.name, one.start, one.count) for one in slices if BUFFER not in one.tensors} == expected


def test_it_says_how_many_files_a_rank_opens(monkeypatch, capsys):
    words = ["--preset", "tiny", "--experts", "8", "--ds_config", "ds_configs/tiny.json", "--ranks", "8"]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words, "--ep_size", "4", "--resume_on", "4", "--resume_ep_size", "2"])
    monkeypatch.chdir(TOOL.parent.parent)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "in 8 files" in out
    assert "a rank opens" in out
