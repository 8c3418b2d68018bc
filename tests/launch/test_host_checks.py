"""What bites on a host. GPUs are those of a fake nvidia-smi, next to a stand-in of torch.cuda."""

import os
import resource
from collections import namedtuple
from dataclasses import asdict
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from refusals import sentences

from megamoe.launch import host_checks
from megamoe.launch.host_checks import Finding, host_findings, package_findings
from megamoe.launch.preflight import Report

LINE = "{}, NVIDIA H100 80GB HBM3, 570.86, {}, {}"
Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture
def host(monkeypatch, tmp_path):
    """This host, with an nvidia-smi that a test writes, and no variables of a launcher."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "OMP_NUM_THREADS", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host_checks, "requires", lambda name: [])
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")

    def write(*lines, code=0):
        script = "\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines), f"exit {code}", ""])
        (tmp_path / "bin" / "nvidia-smi").write_text(script)
        (tmp_path / "bin" / "nvidia-smi").chmod(0o755)

    return write


def have_cuda(monkeypatch, is_available, devices=2):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nccl = SimpleNamespace(version=lambda: (2, 28, 3))
    cuda = SimpleNamespace(is_available=lambda: is_available, device_count=lambda: devices, nccl=nccl)
    monkeypatch.setattr(torch, "cuda", cuda)


def found(tmp_path, **options):
    """By what they are of, those that are not ok."""
    all_found = host_findings(tmp_path / "runs" / "mine", options.pop("ranks", 2), **options)
    sentences([str(one) for one in all_found if one.severity != "ok"])
    return {one.what: (one.severity, str(one)) for one in all_found if one.severity != "ok"}


def test_a_torch_that_cannot_use_the_gpus_of_its_host_is_an_error_unless_cpu_is_asked_for(host, tmp_path, monkeypatch):
    host(LINE.format(0, 4, 0), LINE.format(1, 4, "[N/A]"))
    monkeypatch.setattr(torch.version, "cuda", None)
    severity, said = found(tmp_path)["GPUs"]
    assert severity == "error"
    assert said.startswith(
        "GPUs: torch's build for CPU sees none of 2 NVIDIA H100 80GB HBM3; install torch's CUDA build"
    )
    have_cuda(monkeypatch, False)
    assert "driver 570.86 gives torch for CUDA 13.0 no GPU of 2" in found(tmp_path)["GPUs"][1]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "GPUs" not in found(tmp_path)


def test_gpus_in_use_or_with_memory_errors_and_a_driver_that_fails_are_warned_of(host, tmp_path, monkeypatch):
    have_cuda(monkeypatch, True)
    host(LINE.format(0, 70000, 0), LINE.format(1, 3, 2), LINE.format(2, 3, "[N/A]"))
    seen = found(tmp_path)
    remedy = "see `nvidia-smi` who computes there, or choose others by CUDA_VISIBLE_DEVICES."
    assert seen["GPU 0"] == ("warning", f"GPU 0: 70000 MiB in use; {remedy}")
    assert "2 uncorrected ECC errors" in seen["GPU 1"][1]
    assert not {"GPUs", "GPU 2"} & seen.keys()
    host("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", code=9)
    assert "NVIDIA driver: nvidia-smi fails (NVIDIA-SMI has failed" in found(tmp_path)["NVIDIA driver"][1]


def test_what_limits_ranks_on_gpus_is_warned_of_there_alone(host, tmp_path, monkeypatch):
    monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    limits = {resource.RLIMIT_NOFILE: (512, 1024), resource.RLIMIT_MEMLOCK: (2**23, 2**23)}
    monkeypatch.setattr(host_checks.resource, "getrlimit", lambda kind: limits.get(kind, (-1, -1)))
    monkeypatch.setattr(host_checks.os, "sched_getaffinity", lambda process: {0, 1, 2})
    (tmp_path / "nccl").mkdir()
    (tmp_path / "nccl" / "libnccl.so.2").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/none:{tmp_path}/nccl")
    host()
    have_cuda(monkeypatch, False)
    assert found(tmp_path).keys() == {"open files"}
    have_cuda(monkeypatch, True)
    seen = found(tmp_path)
    assert seen.keys() == {"open files", "shared memory", "cores", "NCCL"}
    assert (
        "0.06 GiB in /dev/shm, needed: 1 GiB, for NCCL; start the container with --shm-size" in seen["shared memory"][1]
    )
    assert "cores: 3, needed: 2 for each of 2 ranks" in seen["cores"][1]
    assert "shared memory" not in found(tmp_path, ranks=1)


def test_a_compiler_is_an_error_where_the_run_needs_it_and_so_is_a_folder_that_cannot_be_written(
    host, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setattr(host_checks.os, "access", lambda path, mode: mode != os.W_OK)
    warned, refused = found(tmp_path), found(tmp_path, compiles=True)
    assert (warned["C++ compiler"][0], refused["C++ compiler"][0]) == ("warning", "error")
    assert "/bin/false compiles nothing (exit code 1), needed: by DeepSpeed" in warned["C++ compiler"][1]
    assert (warned["compiled operators"][0], warned["run folder"][0]) == ("warning", "error")


def test_packages_that_are_absent_or_of_another_version_are_found_by_what_is_required(monkeypatch):
    required = ["no_such_package>=1", "torch>=99", 'absent_extra; extra == "dev"', "numpy>=1"]
    monkeypatch.setattr(host_checks, "requires", lambda name: required)
    *wrong, packages = package_findings()
    assert [(one.what, one.severity) for one in wrong] == [("no_such_package", "error"), ("torch", "warning")]
    assert f"torch {metadata.version('torch')}" in packages.value


def test_a_job_whose_end_is_unknown_and_threads_that_are_not_a_share_are_warned_of(host, tmp_path, monkeypatch):
    monkeypatch.setattr(host_checks.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = found(tmp_path)
    assert "give --time_limit" in seen["end of the Slurm job"][1]
    assert "OMP_NUM_THREADS: 1, needed: 4, the share of a rank; unset it" in seen["OMP_NUM_THREADS"][1]
    assert "OMP_NUM_THREADS" not in found(tmp_path, ranks=None)  # unknown


def test_findings_come_through_a_report_as_they_are():
    one = Finding("warning", "cores", "3", "4", "ask for more")
    report = Report("h1", "", 0, {}, [], True, "h2", None, 1, False, [one])
    assert Report.of(asdict(report)) == report
