"""What will bite on a host: a finding for each thing looked at, with its remedy where there is something to change.

`megamoe doctor` prints those of this host; before a start on several, each adds its own to its report (`preflight.py`).
So nothing here takes a second.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from megamoe.utils.compiler import compiler_problem
from megamoe.utils.disk import existing_folder
from megamoe.utils.host_memory import memory_limits

GIB = 2**30
SMI_SECONDS = 20
GPU_FIELDS = ("index", "name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")
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
    gpus, trouble = ([], []) if on_cpu else ask_nvidia_smi()
    has_gpus = bool(gpus) or (torch.cuda.is_available() and not on_cpu)
    found = [*package_findings(), *trouble, *gpu_findings(gpus), *build_findings(compiles, has_gpus)]
    return [*found, *limit_findings(ranks, has_gpus), *job_findings(folder)]


def package_findings() -> Iterator[Finding]:
    try:
        listed = [Requirement(line) for line in requires("megamoe") or []]
    except PackageNotFoundError:  # a checkout, whose tool has looked for what is absent before it comes here
        listed = []
    for one in listed:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        remedy = "install megamoe again in this environment, with pip"
        try:
            if not one.specifier.contains(found := version(one.name), prereleases=True):
                yield Finding("warning", one.name, found, str(one.specifier), remedy)
        except PackageNotFoundError:
            yield Finding("error", one.name, "not installed", str(one.specifier), remedy)
    yield Finding("ok", "packages", ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "numpy")))


def ask_nvidia_smi() -> tuple[list[dict[str, str]], list[Finding]]:
    """GPU_FIELDS of each of this host's GPUs, and what keeps the driver from saying them."""
    words = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    if not shutil.which("nvidia-smi"):
        return [], []
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SMI_SECONDS)
        if not done.returncode:
            return [dict(zip(GPU_FIELDS, line.split(", "), strict=False)) for line in done.stdout.splitlines()], []
        why = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    return [], [Finding("warning", "NVIDIA driver", f"nvidia-smi fails ({why})", "", "reload it, or reboot the host")]


def gpu_findings(gpus: list[dict[str, str]]) -> Iterator[Finding]:
    """Whether torch can compute on the GPUs, and whether they are free and sound."""
    cuda, driver = torch.version.cuda, gpus[0]["driver_version"] if gpus else "unknown"
    names = [one["name"] for one in gpus]
    all_gpus = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else "none"
        seen = f"torch sees {torch.cuda.device_count()} of {all_gpus or 'an unknown number'}"
        yield Finding("ok", "GPUs", f"{seen}; driver {driver}, CUDA {cuda}, NCCL {nccl}")
    elif not gpus:
        yield Finding("ok", "GPUs", "none; ranks train on CPU")
    else:
        is_built = cuda or torch.version.hip
        value = f"driver {driver} gives torch for CUDA {cuda} no GPU" if is_built else "torch's build for CPU sees none"
        remedy = "update the driver, or install torch for its CUDA" if is_built else "install torch's CUDA build"
        remedy += "; or set DS_ACCELERATOR=cpu to train on CPU"
        yield Finding("error", "GPUs", f"{value} of {all_gpus}", "", remedy)
    for one in gpus:
        used, errors = one.get(GPU_FIELDS[3], ""), one.get(GPU_FIELDS[4], "")
        if used.isdigit() and int(used) > USED_MIB:
            remedy = "see `nvidia-smi` who computes there, or choose others by CUDA_VISIBLE_DEVICES"
            yield Finding("warning", f"GPU {one['index']}", f"{used} MiB in use", "", remedy)
        if errors.isdigit() and int(errors):
            remedy = "have it reset, or leave it out by CUDA_VISIBLE_DEVICES"
            yield Finding("warning", f"GPU {one['index']}", f"{errors} uncorrected ECC errors", "", remedy)


def build_findings(compiles: bool, has_gpus: bool) -> Iterator[Finding]:
    """What compiles DeepSpeed's operators, and which libraries are loaded."""
    from torch.utils.cpp_extension import CUDA_HOME, get_default_build_root

    value, _, remedy = (compiler_problem() or "compiles").rstrip(".").partition("; ")
    yield judged(bool(remedy), "C++ compiler", value, "by DeepSpeed's operators and --compile", remedy, compiles)
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    is_fixed, remedy = not os.access(existing_folder(built), os.W_OK), "set TORCH_EXTENSIONS_DIR to a folder that is"
    yield judged(is_fixed, "compiled operators", f"go into {built}", "a folder that can be written", remedy, compiles)
    if compiles and has_gpus and torch.version.cuda:
        nvcc, wanted = Path(CUDA_HOME or "/none", "bin", "nvcc"), torch.version.cuda.split(".")[0]
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc.exists() else ""
        release = re.search(r"release (\d+)", told)
        found, remedy = release[1] if release else "none", f"set CUDA_HOME to a toolkit of CUDA {wanted}"
        yield judged(found != wanted, "nvcc of CUDA", found, f"{wanted}, as torch's", remedy, True)
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if has_gpus else []:
        if folder and Path(folder, "libnccl.so.2").exists():
            remedy = "take it out, unless that version is wanted"
            yield Finding("warning", "NCCL", f"LD_LIBRARY_PATH has another than torch's, in {folder}", "", remedy)


def limit_findings(ranks: int | None, has_gpus: bool) -> Iterator[Finding]:
    """What the system, a container or a job allows."""
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    is_used, remedy = has_gpus and ranks != 1, "start the container with --shm-size=8g, or mount memory there"
    needed = "1 GiB, for NCCL" if is_used else ""
    yield judged(is_used and shared < GIB, "shared memory", f"{shared / GIB:.2f} GiB in /dev/shm", needed, remedy)
    files, remedy = resource.getrlimit(resource.RLIMIT_NOFILE)[1], "raise `ulimit -Hn`, or --ulimit of the container"
    few = 0 <= files < 4096
    yield judged(few, "open files", _limit(files), "4096: rank 0 has two connections to each rank", remedy)
    locked, adapters = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], Path("/sys/class/infiniband")
    is_used, remedy = adapters.is_dir() and any(adapters.iterdir()), "set `ulimit -l unlimited` for jobs and containers"
    needed = "no limit, for InfiniBand" if is_used else ""
    yield judged(is_used and locked >= 0, "locked memory", f"{_limit(locked)} bytes", needed, remedy)
    limit, available = memory_limits()
    yield Finding("ok", "memory", f"{available / GIB:.1f} GiB available of {limit / GIB:.1f} GiB")
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
    value, disk = f"{shutil.disk_usage(above).free / GIB:.1f} GiB free at {above}", os.statvfs(above)
    is_fixed, needed = not os.access(above, os.W_OK), "to be written, with room for 1000 files"
    is_full = 0 < disk.f_favail < 1000
    yield judged(is_fixed or is_full, "run folder", value, needed, "choose another --run_dir", is_fixed)
    if "SLURM_JOB_ID" in os.environ:
        end, remedy = os.environ.get("SLURM_JOB_END_TIME", "unknown"), "give --time_limit, to save before"
        yield judged(end == "unknown", "end of the Slurm job", end, "", remedy)
    names = [name for name in ("ssh", "pdsh", "srun") if shutil.which(name)]
    yield Finding("ok", "for several hosts", ", ".join(["torchrun", *names]))


def _limit(count: int) -> str:
    return "unlimited" if count < 0 else str(count)
