"""`make gpu`, as far as a host without GPUs lets it: what it refuses, selects, reads and writes."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import check_gpu
import pytest
import torch
from benchmark import ContenderFailed
from benchmark_contender import Machine, Turn
from check_gpu import Check
from gpu_table import BEGIN, END
from refusals import has, only, refusal

from megamoe.config import cli
from megamoe.config.model import load_preset
from megamoe.planning.step_profile import StepProfile, Total


class Collected:
    """A plugin of pytest that keeps what is selected."""

    def pytest_collection_finish(self, session):
        self.found = {item.nodeid.removeprefix("tests/").partition("[")[0] for item in session.items}


def test_gpu_selects_tests_of_every_part_that_runs_on_one(monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.chdir(check_gpu.ROOT)
    # Those that can have such a case: by its mark, or by what stands for it in `devices`.
    texts = {path: path.read_text() for path in Path("tests").rglob("test_*.py")}
    files = [str(path) for path, text in texts.items() if "mark.gpu" in text or "from devices import" in text]
    plugin = Collected()
    words = ["-o", "addopts=", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    assert pytest.main([*words, *files], [plugin]) == 0
    assert {name.partition("/")[0] for name in plugin.found} == {
        "data",
        "launch",
        "launchers",
        "model",
        "planning",
        "training",
    }
    assert len(plugin.found) >= 20


def test_the_device_is_described_for_the_file_and_its_name(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=40 * 2**30, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setenv("PATH", "")  # without nvidia-smi
    device = check_gpu.describe_device()
    assert check_gpu.file_name(device) == "gpu-nvidia-a100-sxm4-40gb-x2.json"
    found = {key: device[key] for key in ("memory_gib", "capability", "driver", "nccl")}
    assert found == {"memory_gib": 40.0, "capability": "8.0", "driver": "unknown", "nccl": "2.27.5"}


def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as caught:
        cli.run(check_gpu.main)
    assert caught.value.code == 2
    has(only(capsys.readouterr().err.splitlines()), "error: ", "no GPU", "make gpu")


def test_a_gpu_that_torch_cannot_use_is_refused_in_a_sentence(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver is too old (found version 11040).\nMore lines.")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # which the driver's own library knows
    monkeypatch.setattr(torch.cuda, "init", init)
    problem = refusal(check_gpu.refuse_unusable_gpus)
    has(problem, "update its driver", "found version 11040")
    assert "More lines" not in problem


def test_gpus_that_take_one_process_only_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)

    def say(*modes):
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=compute_mode ] && echo "{" ".join(modes)}"\n')
        smi.chmod(0o755)

    say("Default", "Default")
    check_gpu.refuse_unusable_gpus()
    say("Default", "Exclusive_Process")
    has(refusal(check_gpu.refuse_unusable_gpus), "Exclusive_Process", "--compute-mode=DEFAULT")


REPORT = """<testsuites><testsuite>
<testcase classname="tests.model.test_moe" name="test_layer[cuda]" time="0.5"/>
<testcase classname="tests.a" name="test_memory" time="1"><properties><property name="GiB" value="12.5"/></properties>
</testcase>
<testcase classname="tests.a" name="test_wrong" time="2"><failure message="off">trace</failure></testcase>
<testcase classname="tests.a" name="test_broken" time="3"><error message="in a fixture">trace</error></testcase>
<testcase classname="tests.a" name="test_two" time="0"><skipped type="pytest.skip" message="needs 2 GPUs"/></testcase>
</testsuite></testsuites>"""


def test_every_check_of_the_report_is_read_with_its_result_and_figures():
    assert check_gpu.read_report(REPORT) == [
        Check("tests.model.test_moe.test_layer[cuda]", "passed", 0.5),
        Check("tests.a.test_memory", "passed", 1.0, {"GiB": "12.5"}),
        Check("tests.a.test_wrong", "failed", 2.0),
        Check("tests.a.test_broken", "failed", 3.0),
        Check("tests.a.test_two", "not run: needs 2 GPUs", 0.0),
    ]


def test_a_check_for_which_there_are_too_few_gpus_is_listed_as_not_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (check,) = check_gpu.run_checks("tests/data/test_prefetch.py")
    assert check.name == "tests.data.test_prefetch.test_a_batch_is_in_page_locked_memory"
    assert check.result == "not run: needs 1 GPU"


def test_checks_that_do_not_start_are_an_error(monkeypatch):
    monkeypatch.setattr(check_gpu.subprocess, "run", lambda words, cwd: subprocess.CompletedProcess(words, 4))
    has(refusal(check_gpu.run_checks), "code 4", "no check")


def turn(tokens, profile=None):
    machine = Machine(gemm_flops=2e9, peak_flops=4e9, bandwidth=1e9, device="a GPU", dtype="bfloat16")
    return Turn(tokens, 1e7 * tokens, machine, [1.0], [0.25], [0.2], memory_gib=3.0, profile=profile)


PROFILE = StepProfile(
    seconds=0.0123,
    operators=900,
    kernels=400,
    busy=0.006,
    gaps=Total(30, 0.005),
    largest_gap=0.001,
    after_largest_gap="a kernel",
    launches=Total(400, 0.002),
    waits={"cudaEventSynchronize": Total(3, 0.004)},
    copies_to_host=Total(3, 0.0001),
    host=0.008,
)


def speed_by(take_turn, monkeypatch):
    monkeypatch.setattr(check_gpu, "take_turn", take_turn)
    return dict(check_gpu.measure_speed("tiny", "ds.json"))


def take_turn(entry, ds_config, steps, *flags):
    """Steps of all sizes, but for DeepSpeed's layer, whose memory ends after two, and for Mixtral, which then fails."""
    assert flags == ("--profile",)
    first, *others = [size * entry.seq_len for size in entry.samples]
    turns = [turn(first, PROFILE), *map(turn, others)]
    if entry.contender == "mixtral":
        raise ContenderFailed("Mixtral ended with code 1.", turns[:2])
    return turns[:2] if entry.contender == "stock" else turns


def test_speed_tells_where_memory_ends_keeps_what_a_failure_left_and_goes_on_after_it(monkeypatch):
    speed = speed_by(take_turn, monkeypatch)
    length = load_preset("tiny").max_position_embeddings
    tokens = [[one["tokens"] // length for one in found["turns"]] for found in speed.values()]
    assert tokens == [[2, 4, 8, 16, 32, 64], [2, 8, 64], [2, 8], [2, 8]]
    ends = [(one["out_of_memory_at_tokens"], one["failure"]) for one in speed.values()]
    assert ends == [(None, None), (None, None), (32 * length, None), (None, "Mixtral ended with code 1.")]
    first = next(iter(speed.values()))["turns"][0]
    assert first["mfu"] == 1e7 * first["tokens"] / 1.25 / 4e9


DEVICE = {"name": "NVIDIA H100 80GB HBM3", "count": 1, "memory_gib": 79.6, "capability": "9.0", "driver": "0.1",
          "cuda": "0.2", "nccl": "0.3"}  # fmt: skip
README = f"before\n\n{BEGIN}\nold\n{END}\n\nbehind\n"


@pytest.mark.parametrize("failed", [False, True])
def test_results_go_to_a_file_named_for_the_gpu_and_into_the_readme(failed, tmp_path, monkeypatch, capsys):
    checks = [Check("one", "failed" if failed else "passed", 1.0), Check("two", "not run: needs 2 GPUs", 0.0)]
    monkeypatch.setattr(check_gpu, "refuse_unusable_gpus", lambda: None)
    monkeypatch.setattr(check_gpu, "describe_device", lambda: DEVICE)
    monkeypatch.setattr(check_gpu, "run_checks", lambda: checks)
    speed = speed_by(lambda *args: [turn(2048, PROFILE)], monkeypatch)
    monkeypatch.setattr(check_gpu, "measure_speed", lambda *args: speed.items())
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert check_gpu.run(tmp_path / "results", readme) is not failed
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == "gpu-nvidia-h100-80gb-hbm3-x1.json"
    written = json.loads(file.read_text())
    assert written["device"] == DEVICE
    assert written["checks"] == [asdict(check) for check in checks]
    assert {"megamoe", "torch", "deepspeed", "transformers", "python"} <= written["versions"].keys()
    has(readme.read_text(), "before\n\n<!--", "1 x NVIDIA H100 80GB HBM3", "2,048", "1 not run", "-->\n\nbehind\n")
    said = capsys.readouterr().out
    has(said, "not run: needs 2 GPUs: two", str(file))
    assert ("failed: one" in said) == failed


def test_an_interrupt_leaves_the_results_so_far(tmp_path, monkeypatch):
    def measure_speed(*args):
        yield "megamoe", {"turns": [], "out_of_memory_at_tokens": 2048, "failure": None}
        raise KeyboardInterrupt

    monkeypatch.setattr(check_gpu, "refuse_unusable_gpus", lambda: None)
    monkeypatch.setattr(check_gpu, "describe_device", lambda: DEVICE)
    monkeypatch.setattr(check_gpu, "run_checks", lambda: [Check("one", "passed", 1.0)])
    monkeypatch.setattr(check_gpu, "measure_speed", measure_speed)
    with pytest.raises(KeyboardInterrupt):
        check_gpu.run(tmp_path, tmp_path / "README.md")
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert [check["name"] for check in written["checks"]] == ["one"]
    assert list(written["speed"]) == ["megamoe"]
