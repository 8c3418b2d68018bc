"""What bites on a host. GPUs are those of a fake nvidia-smi, next to a stand-in of torch.cuda."""

import os
import resource
from collections import namedtuple
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.utils.cpp_extension  # whole, before a test replaces torch.cuda
from refusals import sentences

from megamoe.launch import host_checks
from megamoe.launch.host_checks import Finding, host_findings, package_findings
from megamoe.launch.preflight import Report, print_warnings

H100 = "NVIDIA H100 80GB HBM3"
Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture
def host(monkeypatch, programs):
    """This host, with an nvidia-smi that prints lines, and a torch that has CUDA, if it is built for it, or not."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host_checks, "requires", lambda name: [])

    def make(*lines, cuda="13.0", count=0, code=0):
        programs(**{"nvidia-smi": "\n".join([*(f"echo '{line}'" for line in lines), f"exit {code}"])})
        nccl = SimpleNamespace(version=lambda: (2, 28, 3))
        fake = SimpleNamespace(is_available=lambda: count > 0, device_count=lambda: count, nccl=nccl)
        monkeypatch.setattr(torch, "cuda", fake)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    make()
    return make


def found(folder, **options):
    """By what they are of, those that are not ok."""
    bad = [one for one in host_findings(folder, options.pop("ranks", 2), **options) if one.severity != "ok"]
    sentences([str(one) for one in bad])
    return {one.what: f"{one.severity}: {one}" for one in bad}


def test_a_torch_that_cannot_use_the_gpus_of_its_host_is_an_error_unless_cpu_is_asked_for(host, tmp_path, monkeypatch):
    host(f"0, {H100}, 570.86, 4, 0", f"1, {H100}, 570.86, 4, [N/A]", cuda=None)
    said = found(tmp_path)["GPUs"]
    assert said.startswith(f"error: GPUs: torch {torch.__version__}, NCCL none, sees 0, nvidia-smi 2 with driver 570")
    assert said.endswith("install torch's CUDA build; or set DS_ACCELERATOR=cpu to train on CPU.")
    host(f"0, {H100}, 450.1, 4, 0")
    assert "; update the driver, or install torch for its CUDA;" in found(tmp_path)["GPUs"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "GPUs" not in found(tmp_path)


def test_gpus_in_use_or_with_memory_errors_and_a_driver_that_fails_are_warned_of(host, tmp_path):
    host(
        *(f"{n}, {H100}, 570.86, {used}, {ecc}" for n, used, ecc in ((0, 70000, 0), (1, 3, 2), (2, 3, "[N/A]"))),
        count=3,
    )
    seen = found(tmp_path, ranks=1)
    assert seen[f"GPU 0, {H100}"].startswith("warning: ")
    assert "70000 MiB in use; see `nvidia-smi` who computes there, or" in seen[f"GPU 0, {H100}"]
    assert "2 uncorrected ECC errors; have it reset" in seen[f"GPU 1, {H100}"]
    assert not {"GPUs", f"GPU 2, {H100}"} & seen.keys()
    host("NVIDIA-SMI has failed", code=9)
    assert "warning: NVIDIA driver: nvidia-smi fails (NVIDIA-SMI has failed);" in found(tmp_path)["NVIDIA driver"]


def test_what_limits_ranks_on_gpus_is_warned_of_there_alone(host, tmp_path, monkeypatch):
    monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (1024, 1024) if kind == resource.RLIMIT_NOFILE else (-1, -1)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert found(tmp_path).keys() == {"open files"}
    host(f"0, {H100}, 570.86, 4, 0", count=1)
    seen = found(tmp_path)
    assert seen.keys() == {"open files", "/dev/shm", "cores"}
    assert "/dev/shm: 64 MiB, needed: 1 GiB for NCCL; start the container with --shm-size" in seen["/dev/shm"]
    assert "cores: 3, needed: 2 for each of 2 ranks" in seen["cores"]
    assert "/dev/shm" not in found(tmp_path, ranks=1)


def test_a_compiler_is_an_error_where_the_run_needs_it_as_is_a_run_folder_that_cannot_be_written(
    host, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    warned, refused = found(tmp_path), found(tmp_path, compiles=True)
    assert "/bin/false compiles nothing (exit code 1), needed: by DeepSpeed" in warned["C++ compiler"]
    kinds = [one["C++ compiler"].partition(":")[0] for one in (warned, refused)]
    assert kinds == [one["compiled operators"].partition(":")[0] for one in (warned, refused)] == ["warning", "error"]
    assert warned["run folder"].startswith("error: ")


def test_packages_that_are_absent_or_of_another_version_are_found_by_what_is_required(monkeypatch):
    required = ["no_such_package>=1", "torch>=99", 'absent_extra; extra == "dev"', "numpy>=1"]
    monkeypatch.setattr(host_checks, "requires", lambda name: required)
    *wrong, packages = package_findings()
    assert [(one.what, one.severity) for one in wrong] == [("no_such_package", "error"), ("torch", "warning")]
    assert packages.severity == "ok"


def test_a_job_whose_end_is_unknown_and_threads_that_are_not_a_share_are_warned_of(host, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = found(tmp_path)
    assert "give --time_limit" in seen["end of the Slurm job"]
    assert "OMP_NUM_THREADS: 1, needed: 4, the share of a rank; unset it" in seen["OMP_NUM_THREADS"]
    assert "OMP_NUM_THREADS" not in found(tmp_path, ranks=None)  # unknown


def test_hosts_send_their_findings_and_each_warning_is_printed_once(capsys):
    few = Finding("warning", "cores", "3", "4", "ask for more")
    first = Report("h1", "", 0, {}, [], True, "h2", None, 1, False, [few, Finding("ok", "GPUs", "none")])
    second = Report(**{**asdict(first), "host": "h2"})
    assert second.findings == first.findings
    print_warnings([first, second])
    assert capsys.readouterr().err == "warning: h1, h2: cores: 3, needed: 4; ask for more.\n"
