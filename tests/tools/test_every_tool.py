"""Every program in tools/ starts, and those that no other test runs do their work once, on something small."""

import contextlib
import importlib
import json
import multiprocessing
import re
import sys
from pathlib import Path

import benchmark_checkpoint
import benchmark_data
import benchmark_ranks
import benchmark_reduction
import pytest
import torch
from ranks import run_alone, start_processes
from refusals import has
from toy import PRESET, SHIPPED

from megamoe.config.run import parse_run
from megamoe.data.corpus import input_files, read_documents, split_documents, write_corpus
from megamoe.data.tokenizer import train_tokenizer
from megamoe.launch.watch import Intervals

PARTS = {"benchmark_models", "ablation_results"}  # of benchmark_contender and ablate
DEADLINE = 240  # seconds, which end a hang
TOOLS = sorted({path.stem for path in (Path(__file__).parents[2] / "tools").glob("*.py")} - PARTS)


def test_every_tool_explains_itself(monkeypatch, capsys):
    for name in TOOLS:
        tool = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as caught:
            tool.main()
        assert caught.value.code == 0, name
        has(capsys.readouterr().out, "usage: ", "--help")
        assert len((tool.__doc__ or "").splitlines()[0]) > 20, name
        assert 'if __name__ == "__main__":' in Path(tool.__file__).read_text(), name


def run_tool(tool, words, said):
    sys.argv = words
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        tool.main()


def save_and_load(words, said):
    run_tool(benchmark_checkpoint, words, said)


def test_saving_and_loading_are_timed_and_leave_nothing(tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps(PRESET))
    words = ["--out", tmp_path / "out", "--preset", tmp_path / "preset.json"]
    words += ["--ds_config", SHIPPED / "zero2_fp32.json"]
    words = ["benchmark_checkpoint.py", *map(str, words), "--rounds", "1", "--tokens", "16"]
    run_alone(save_and_load, words, tmp_path / "said")
    has((tmp_path / "said").read_text(), "bare save=", "load=", "x bare load", "peak memory of rank 0: ")
    assert not (tmp_path / "out").exists()


def join_and_die(words, said):
    multiprocessing.current_process()._config["daemon"] = False  # or it may have no children
    benchmark_ranks.IDLE_SECONDS, benchmark_ranks.INTERVALS = 0.1, Intervals(heartbeat=0.2, dead=1)
    run_tool(benchmark_ranks, words, said)


def test_ranks_join_and_learn_of_a_death_with_one_line(tmp_path):
    (process,) = start_processes(1, join_and_die, ["benchmark_ranks.py", "--ranks", "8"], tmp_path / "said")
    process.join(DEADLINE)
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert re.search(r"join: .* store 6 requests and [\d,]+ bytes per rank", said)
    assert len(re.findall(r"rank [07], .*: the last of the others exits after .* s; lines printed: 1\n", said)) == 3
    assert "sample order: " in said


def test_sums_in_16_bits_stall_in_a_ring_and_neither_in_pairs_nor_in_32():
    same = [torch.full((4,), 0.5, dtype=torch.bfloat16)] * 1024
    expected = {
        (benchmark_reduction.sum_in_ring, torch.bfloat16): 128.0,  # half a unit in the last place above is rounded away
        (benchmark_reduction.sum_in_ring, torch.float32): 512.0,
        (benchmark_reduction.sum_in_pairs, torch.bfloat16): 512.0,
    }
    for (add, dtype), total in expected.items():
        assert add(same, dtype).tolist() == [total] * 4
    exact = torch.full((4,), 512.0, dtype=torch.float64)
    assert benchmark_reduction.compare(exact / 4, exact) == (0.75, 0.25)


def test_what_16_bits_cost_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_reduction.py", "--elements", "64"])
    benchmark_reduction.main()
    has(capsys.readouterr().out, " 1024  ring      bfloat16", "    8  in pairs  float32")


@pytest.fixture
def text_and_corpus(tmp_path):
    (tmp_path / "text.txt").write_text("The mouse unrolls the map.\nIt shows a river, a mill and a bridge.\n" * 400)
    documents = list(read_documents(input_files(tmp_path / "text.txt"), "text", lambda _: None))
    write_corpus(split_documents(documents, 0), train_tokenizer(documents, 270), tmp_path / "corpus")
    return tmp_path / "text.txt", tmp_path / "corpus"


def test_tokenising_reading_and_starting_are_timed(text_and_corpus, monkeypatch, capsys):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # which the tool changes
    monkeypatch.setattr(benchmark_data, "ENOUGH", 50_000)
    started = []

    class Run:
        """Stands for a run, which others test."""

        def __init__(self, words, **_):
            assert Path(words[0]).is_file()
            parse_run(words[2:])
            started.append(words[1])
            self.stdout = iter(["note\n", "step=1 loss=2\n"])

        def communicate(self):
            pass

    monkeypatch.setattr(benchmark_data.subprocess, "Popen", Run)
    monkeypatch.setattr(sys, "argv", ["benchmark_data.py", *map(str, text_and_corpus), "--rounds", "1"])
    benchmark_data.main()
    said = capsys.readouterr().out
    assert len(re.findall(r"tokenising on .*: [\d.]+ MB/s", said)) == 2
    assert len(re.findall(r"reading a sample of (256|1024) tokens: [\d.]+ ms", said)) == 2
    assert len(re.findall(r"corpora: [15], ranks: (?:1|8|1024): .*: [\d.]+ ms", said)) == 6
    assert len(re.findall(r"to the first step, [12] rank\(s\): [\d.]+ s", said)) == 2
    assert started == ["1", "2"]
