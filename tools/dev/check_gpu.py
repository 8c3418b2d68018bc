"""What only a GPU can show, in ten minutes: checks, speed and a profile.

    make gpu            writes docs/results/gpu-NAME.json, and the README's table from it

The checks are the tests with the mark `gpu`; a check that needs more GPUs than there are is listed as not run. Then
`tools/dev/benchmark.py` times steps of the full model on one GPU, by every contender, until memory ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmark import (
    ContenderFailed,
    entry_of,
    out_of_memory_at,
    resolved_file,
    table_of_profiles,
    table_of_sizes,
    take_turn,
)
from gpu_table import ROOT, write_table

from megamoe.config import cli
from megamoe.config.model import load_preset
from megamoe.launch.versions import versions
from megamoe.utils.errors import UserError

CONTENDERS = {  # with samples per step; fewer where each size is compiled for itself, which takes longer than its steps
    "megamoe:1": (2, 4, 8, 16, 32, 64),
    "compiled:1": (2, 8, 64),
    "stock:1": (2, 8, 32),
    "mixtral:1": (2, 8, 32),
}
STEPS = 3  # timed, of each size


@dataclass(frozen=True)
class Check:
    name: str
    result: str  # "passed", "failed", or "not run: " and why
    seconds: float
    figures: dict[str, str] = field(default_factory=dict)


def run_checks(*words: str) -> list[Check]:
    """Run the tests with the mark `gpu`, one after the other; `words` are further ones for pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        done = subprocess.run([*command, *words], cwd=ROOT)
        checks = read_report(report.read_text()) if report.exists() else []
    if not checks:
        raise UserError(f"pytest ended with code {done.returncode} and ran no check; its output is above.")
    return checks


def read_report(xml: str) -> list[Check]:
    """The checks in pytest's JUnit report."""
    checks = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        result = "failed" if failed else "passed" if skipped is None else f"not run: {skipped.get('message')}"
        figures = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        name = f"{case.get('classname')}.{case.get('name')}"
        checks.append(Check(name, result, float(case.get("time", 0)), figures))
    return checks


def measure_speed(preset: str, ds_config: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each contender's name with its turns, at which size memory ended, and what went wrong. A failure of one stops no
    other."""
    config = load_preset(preset)
    for word, samples in CONTENDERS.items():
        entry = entry_of(word, preset, samples, config)
        failure = end = None
        try:
            turns = take_turn(entry, ds_config, STEPS, "--profile")
            end = out_of_memory_at(entry, turns)
        except ContenderFailed as error:
            turns, failure = error.turns, str(error)
        name = str(entry)
        print(f"\n{table_of_sizes([name], [turns], [end])}\n\n{table_of_profiles([name], [turns])}\n", flush=True)
        yield (
            name,
            {
                "samples": samples,
                "turns": [
                    {**asdict(turn), "tokens_per_second": turn.tokens_per_second, "mfu": turn.mfu} for turn in turns
                ],
                "out_of_memory_at_tokens": end,
                "failure": failure,
            },
        )


def describe_device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": next(iter(ask_driver("driver_version")), "unknown"),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def ask_driver(field: str) -> list[str]:
    """What nvidia-smi knows, for each GPU of the host; nothing where it does not run."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def refuse_unusable_gpus() -> None:
    """Raises UserError where there is no GPU, torch cannot use it, or it takes one process only."""
    if not torch.cuda.device_count():
        raise UserError(
            f"torch {torch.__version__} sees no GPU on this host; run `make gpu` on one with a GPU and torch for CUDA."
        )
    try:
        torch.cuda.init()
    except RuntimeError as error:  # such as a driver too old, whose GPUs are counted nevertheless
        raise UserError(
            f"torch {torch.__version__} cannot use the GPU of this host; update its driver, or install a torch for it: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if "Exclusive_Process" in ask_driver("compute_mode"):
        raise UserError(
            "a GPU of this host is in compute mode Exclusive_Process, but the checks start several processes on each; "
            "set it by `nvidia-smi --compute-mode=DEFAULT`, as root."
        )


def file_name(device: dict[str, Any]) -> str:
    """For the results of this kind and number of GPUs."""
    words = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
    return f"gpu-{words}-x{device['count']}.json"


def run(results: Path, readme: Path) -> bool:
    """Check and measure, write results as they come, then the table; returns whether all is well. Raises UserError
    where it cannot begin."""
    refuse_unusable_gpus()
    started = time.monotonic()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": describe_device(),
        "versions": {**versions(), "transformers": importlib.metadata.version("transformers")},
        "checks": [],
        "speed": {},
    }
    results.mkdir(parents=True, exist_ok=True)
    file = results / file_name(result["device"])

    def save() -> None:
        result["seconds"] = round(time.monotonic() - started)
        file.write_text(json.dumps(result, indent=2) + "\n")

    result["checks"] = [asdict(check) for check in run_checks()]
    save()
    with tempfile.TemporaryDirectory() as folder:
        for name, measured in measure_speed(
            "moe-680m", resolved_file(str(ROOT / "ds_configs/zero2.json"), Path(folder))
        ):
            result["speed"][name] = measured
            save()
    write_table(readme, results)
    return report(result, file)


def report(result: dict[str, Any], file: Path) -> bool:
    """Print what did not pass, and how long it took; returns whether nothing has failed."""
    for check in result["checks"]:
        if check["result"] != "passed":
            print(f"{check['result']}: {check['name']}")
    failures = [f"{name}: {one['failure']}" for name, one in result["speed"].items() if one["failure"]]
    print("\n".join([*failures, f"{file}, after {result['seconds']} s"]))
    return not failures and all(check["result"] != "failed" for check in result["checks"])


def main() -> None:
    cli.Parser(description="Check and measure megamoe on the GPUs of this host.").parse()
    sys.exit(0 if run(ROOT / "docs/results", ROOT / "README.md") else 1)


if __name__ == "__main__":
    cli.run(main)
