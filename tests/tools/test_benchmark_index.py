"""The index of ranks that are not there."""

import os
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from engines import GATED, train_and_save
from indexed import write
from ranks import run_ranks
from toy import ds_config

from megamoe.checkpoint.index import BUFFER, Range, read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.planning.sharding import read_setup

TOOL = Path(__file__).parent.parent.parent / "tools" / "benchmark_index.py"


def test_its_slices_are_those_that_an_engine_saves(tmp_path):
    run_ranks(4, partial(train_and_save, config=GATED), tmp_path / "checkpoints", 2)
    saved = read_index(tmp_path / "checkpoints" / "step_3")
    setup = read_setup(GATED, ds_config(1), 4, 2, 16, on_cpu=True)
    slices_by_rank = runpy.run_path(str(TOOL))["slices_by_rank"]
    for rank, expected in enumerate(slices_by_rank(setup)):
        slices = [one for one in saved.files[f"rank_{rank:05d}.safetensors"].slices if BUFFER not in one.tensors]
        assert [(one.name, one.start, one.count) for one in slices] == [
            (one.name, one.start, one.count) for one in expected
        ]


def test_it_counts_the_bytes_that_a_resumed_rank_reads(tmp_path, monkeypatch):
    index = write(tmp_path / "step_3")
    wanted = [Range("model.a.weight", 15, 10), Range("model.b.weight", 0, 3), Range("model.norm.weight", 2, 1)]
    (part,) = index.parts([wanted])
    source, read, preadv = IndexedFiles(tmp_path / "step_3", part), [], os.preadv

    def count(*args):
        read.append(preadv(*args))
        return read[-1]

    monkeypatch.setattr(os, "preadv", count)
    for one in wanted:
        for kind in index.kinds:
            source.read(one.name, kind, one.start, one.count)
    assert runpy.run_path(str(TOOL))["bytes_read"](part, wanted) == sum(read)


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
