"""What will bite on a host: a finding for each thing looked at, with its remedy where there is something to change.

`megamoe doctor` prints those of this host; before a start on several, each adds its own to its report (`preflight.py`).
So nothing here takes a second.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from megamoe.utils.compiler import compiler_problem
from megamoe.utils.disk import existing_folder
from megamoe.utils.text import size

SMI_SECONDS = 20
USED_MIB = 1024  # of a GPU's memory, from which on somebody is taken to compute there


@dataclass(frozen=True)
class Finding:
    """One thing looked at; as a string, a sentence."""

    severity: Literal["ok", "warning", "error"]
    what: str
    value: str
    needed: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        needed, remedy = self.needed and f", needed: {self.needed}", self.remedy and f"; {self.remedy}."
        return f"{self.what}: {self.value}{needed}{remedy}"


def judged(bad: bool, what: str, value: str, needed: str, remedy: str, refuses: bool = False) -> Finding:
    """A warning, or an error where it `refuses`, with its remedy, if it is `bad`; else ok."""
    return Finding(("error" if refuses else "warning") if bad else "ok", what, value, needed, remedy if bad else "")


def host_findings(folder: Path, ranks: int | None = None, compiles: bool = False) -> list[Finding]:
    """All of this host.

    Args:
        folder: of the run; need not exist.
        ranks: that it will have, if that is known.
        compiles: the run is known to need a compiler.
    """
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_gpus = torch.cuda.is_available() and not on_cpu
    found = [*package_findings(), *([] if on_cpu else gpu_findings()), *build_findings(compiles, has_gpus)]
    return [*found, *limit_findings(ranks, has_gpus), *job_findings(folder)]


def package_findings() -> Iterator[Finding]:
    remedy = "install megamoe again in this environment, with pip"
    with contextlib.suppress(PackageNotFoundError):  # a checkout, whose tool has looked for what is absent
        for one in map(Requirement, requires("megamoe") or []):
            if one.marker and not one.marker.evaluate({"extra": ""}):
                continue
            found = next((each.version for each in distributions(name=one.name)), None)
            if found is None or not one.specifier.contains(found, prereleases=True):
                yield judged(True, one.name, found or "not installed", str(one.specifier), remedy, found is None)
    yield Finding("ok", "packages", ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "numpy")))


def gpu_findings() -> Iterator[Finding]:
    """Whether torch can compute on this host's GPUs, and whether they are free and sound."""
    fields = "index,name,driver_version,memory.used,ecc.errors.uncorrected.volatile.total"
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    gpus: list[list[str]] = []
    with contextlib.suppress(OSError):  # there is none
        try:
            told = subprocess.run(words, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
            gpus = [line.split(", ") for line in told.splitlines() if line.count(", ") == 4]
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            value = f"nvidia-smi fails ({str(error.stdout or error).strip()})"
            yield Finding("warning", "NVIDIA driver", value, "", "reload it, or reboot the host")
    for index, name, _, used, errors in gpus:
        if used.isdigit() and int(used) > USED_MIB:
            remedy = "see `nvidia-smi` who computes there, or choose others by CUDA_VISIBLE_DEVICES"
            yield Finding("warning", f"GPU {index}, {name}", f"{used} MiB in use", "", remedy)
        if errors.isdigit() and int(errors):
            remedy = "have it reset, or leave it out by CUDA_VISIBLE_DEVICES"
            yield Finding("warning", f"GPU {index}, {name}", f"{errors} uncorrected ECC errors", "", remedy)
    cuda, count = torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus and not count:
        yield Finding("ok", "GPUs", "none; ranks train on CPU")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and count else "none"
    driver = f" with driver {gpus[0][2]}" if gpus else ""
    value = f"torch {torch.__version__}, NCCL {nccl}, sees {count}, nvidia-smi {len(gpus)}{driver}"
    remedy = "update the driver, or install torch for its CUDA" if cuda else "install torch's CUDA build"
    yield judged(not count, "GPUs", value, "", f"{remedy}; or set DS_ACCELERATOR=cpu to train on CPU", True)


def build_findings(compiles: bool, has_gpus: bool) -> Iterator[Finding]:
    """What compiles DeepSpeed's operators."""
    from torch.utils.cpp_extension import CUDA_HOME, get_default_build_root

    value, _, remedy = (compiler_problem() or "compiles").rstrip(".").partition("; ")
    yield judged(bool(remedy), "C++ compiler", value, "by DeepSpeed's operators and --compile", remedy, compiles)
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    is_fixed, remedy = not os.access(existing_folder(built), os.W_OK), "set TORCH_EXTENSIONS_DIR to a folder that is"
    yield judged(is_fixed, "compiled operators", f"go into {built}", "a folder that can be written", remedy, compiles)
    if compiles and has_gpus and torch.version.cuda:
        nvcc, wanted = Path(CUDA_HOME or "/none", "bin", "nvcc"), torch.version.cuda.split(".")[0]
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc.exists() else ""
        remedy = f"set CUDA_HOME to a toolkit of CUDA {wanted}"
        yield judged(f"release {wanted}." not in told, "nvcc", str(nvcc), f"that of CUDA {wanted}", remedy, True)


def limit_findings(ranks: int | None, has_gpus: bool) -> Iterator[Finding]:
    """What the system, a container or a job allows."""
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    needs, remedy = has_gpus and ranks != 1, "start the container with --shm-size=8g, or mount memory there"
    yield judged(needs and shared < 2**30, "/dev/shm", size(shared), "1 GiB for NCCL" * needs, remedy)
    files, remedy = resource.getrlimit(resource.RLIMIT_NOFILE)[1], "raise `ulimit -Hn`, or --ulimit of the container"
    yield judged(0 <= files < 4096, "open files", str(files), "4096: rank 0 has two connections to each rank", remedy)
    locked, adapters = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], Path("/sys/class/infiniband")
    needs, remedy = adapters.is_dir() and any(adapters.iterdir()), "set `ulimit -l unlimited` for jobs and containers"
    yield judged(needs and locked >= 0, "locked memory", f"{locked} bytes", "-1 for InfiniBand" * needs, remedy)
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    if ranks and has_gpus:
        remedy = "ask for more, in Slurm by --cpus-per-task"
        yield judged(cores < 2 * ranks, "cores", str(cores), f"2 for each of {ranks} ranks", remedy)
    elif ranks and threads.isdigit():
        share = max(cores // ranks, 1)
        yield judged(int(threads) != share, "OMP_NUM_THREADS", threads, f"{share}, the share of a rank", "unset it")


def job_findings(folder: Path) -> Iterator[Finding]:
    """The run folder, and what a launcher has set."""
    above = existing_folder(folder)
    files, is_fixed = os.statvfs(above).f_favail, not os.access(above, os.W_OK)
    needed, remedy = "to be written, with room for 1000 files", "choose another --run_dir"
    yield judged(is_fixed or 0 < files < 1000, "run folder", f"below {above}", needed, remedy, is_fixed)
    if "SLURM_JOB_ID" in os.environ:
        end, remedy = os.environ.get("SLURM_JOB_END_TIME", "unknown"), "give --time_limit, to save before"
        yield judged(end == "unknown", "end of the Slurm job", end, "", remedy)
    names = [name for name in ("ssh", "pdsh", "srun") if shutil.which(name)]
    yield Finding("ok", "for several hosts", ", ".join(["torchrun", *names]))
