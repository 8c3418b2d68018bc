"""The table of `make gpu` in the README."""

import json
import shutil
from dataclasses import asdict

import pytest
from gpu_table import BEGIN, END, ROOT, write_table
from refusals import has, refusal
from test_check_gpu import DEVICE, PROFILE, turn

TEXT = f"# Title\n\n{BEGIN}\nold\n{END}\n\nbehind\n"
RESULT = {
    "date": "2000-01-02",
    "device": DEVICE,
    "versions": {"megamoe": "1 (source 0)", "torch": "2", "deepspeed": "3"},
    "checks": [{"result": result} for result in ("passed", "passed", "not run: needs 2 GPUs", "failed")],
    "speed": {
        "megamoe, 1 rank": {
            "turns": [asdict(turn(2048, PROFILE)), asdict(turn(4096))],
            "out_of_memory_at_tokens": None,
            "failure": None,
        },
        "Mixtral": {"turns": [asdict(turn(2048))], "out_of_memory_at_tokens": 4096, "failure": None},
        "broken": {"turns": [], "out_of_memory_at_tokens": None, "failure": "it broke"},
    },
}


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    (tmp_path / "results").mkdir()
    return path


def test_without_a_file_it_says_that_nothing_is_measured_yet(readme, tmp_path):
    write_table(readme, tmp_path / "results")
    assert readme.read_text() == f"# Title\n\n{BEGIN}\nNot yet measured: `make gpu`.\n\n{END}\n\nbehind\n"


def test_every_file_has_its_facts_and_two_tables_and_writing_again_changes_nothing(readme, tmp_path):
    for name in ("gpu-a.json", "gpu-b.json"):
        (tmp_path / "results" / name).write_text(json.dumps(RESULT))
    write_table(readme, tmp_path / "results")
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n**1 x NVIDIA H100 80GB HBM3**, driver 0.1, CUDA 0.2, megamoe 1")
    assert text.endswith(f"{END}\n\nbehind\n")
    assert "old" not in text
    has(text, "2000-01-02; checks: 2 passed, 1 failed, 1 not run. broken failed.", "results/gpu-a.json", "gpu-b.json")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[: len(rows) // 2] == [
        "| tokens per step | megamoe, 1 rank | Mixtral |",
        "|---|---|---|",
        "| 2,048 | 1,638 tokens/s, 409.6% MFU, 3.0 GiB | 1,638 tokens/s, 409.6% MFU, 3.0 GiB |",
        "| 4,096 | 3,277 tokens/s, 819.2% MFU, 3.0 GiB | out of memory |",
        "| a profiled step | tokens | step | kernels | device busy | gaps, the largest | waits of the host "
        "| copies to the host | host per kernel |",
        "|---|---|---|---|---|---|---|---|---|",
        "| megamoe, 1 rank | 2,048 | 12.30 ms | 400 | 49% | 5.00 ms, 1.00 ms before `a kernel` | 3, 4.00 ms | 3 "
        "| 20.0 us |",
    ]
    write_table(readme, tmp_path / "results")
    assert readme.read_text() == text


def test_a_readme_without_the_marks_is_refused(tmp_path):
    (tmp_path / "README.md").write_text(f"{END}\n{BEGIN}\n")
    has(refusal(lambda: write_table(tmp_path / "README.md", tmp_path)), "README.md", BEGIN)


def test_the_readme_has_what_the_committed_results_give(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)
    write_table(copy, ROOT / "docs/results")
    assert copy.read_text() == (ROOT / "README.md").read_text()
