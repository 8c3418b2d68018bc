"""What only a GPU can show, in ten minutes: checks, speed and a profile. Needs no network.

    make gpu                                       writes docs/results/gpu-NAME.json, the table of performance.md
    python tools/dev/check_gpu.py --parts checks   one part, which ends after ten minutes with what it has

The checks are the tests with the mark `gpu`; a check that needs more GPUs than there are is listed as not run. Then
`tools/dev/benchmark.py` times steps of the full model on one GPU, by every contender, until memory ends.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
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
from megamoe.utils.errors import UserError, first_line

CONTENDERS = {  # with samples per step; fewer where each size is compiled for itself, which takes longer than its steps
    "megamoe:1": (2, 4, 8, 16, 32, 64),
    "compiled:1": (2, 8, 64),
    "stock:1": (2, 8, 32),
    "mixtral:1": (2, 8, 32),
}
STEPS = 3  # timed, of each size
CHECKS = "checks"
PARTS = (CHECKS, *CONTENDERS)
LIMIT = 9 * 60  # seconds of a part, and some to end
TIMED_OUT = 124  # the exit code of timeout(1)


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
        limited = ["timeout", "--signal=INT", "--kill-after=50", str(LIMIT)]  # after which pytest writes its report
        done = subprocess.run([*limited, *command, *words], cwd=ROOT)
        checks = read_report(report.read_text()) if report.exists() else []
    if not checks:
        raise UserError(f"pytest ended with code {done.returncode} and ran no check; its output is above.")
    if done.returncode == TIMED_OUT:
        checks.append(Check("all others", f"not run: {LIMIT} s were over", 0.0))
    return checks


def read_report(xml: str) -> list[Check]:
    """The checks in pytest's JUnit report."""
    checks = []
    for case in ElementTree.fromstring(xml).iterfind(".//testcase[@name]"):  # without one: that which was interrupted
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        result = "failed" if failed else "passed" if skipped is None else f"not run: {skipped.get('message')}"
        figures = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        name = f"{case.get('classname')}.{case.get('name')}"
        checks.append(Check(name, result, float(case.get("time", 0)), figures))
    return checks


def measure_speed(word: str, preset: str, ds_config: str) -> tuple[str, dict[str, Any]]:
    """A contender's name, and its turns, at which size memory ended, and what went wrong. Raises UserError where it
    cannot begin."""
    entry = entry_of(word, preset, CONTENDERS[word], load_preset(preset))
    failure = end = None
    try:
        turns = take_turn(entry, ds_config, STEPS, "--profile", limit=LIMIT)
        end = out_of_memory_at(entry, turns)
    except ContenderFailed as error:
        turns, failure = error.turns, str(error)
    name = str(entry)
    print(f"\n{table_of_sizes([name], [turns], [end])}\n\n{table_of_profiles([name], [turns])}\n", flush=True)
    measured = {
        "samples": CONTENDERS[word],
        "turns": [{**asdict(turn), "tokens_per_second": turn.tokens_per_second, "mfu": turn.mfu} for turn in turns],
        "out_of_memory_at_tokens": end,
        "failure": failure,
    }
    return name, measured


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


def run(results: Path, page: Path, parts: Sequence[str]) -> bool:
    """Check and measure, write the results of each part when it has ended, then the table; returns whether all is well.
    A part that fails is named, and the others run. Raises UserError where none can."""
    refuse_unusable_gpus()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": describe_device(),
        "versions": {**versions(), "transformers": importlib.metadata.version("transformers")},
        "checks": [],
        "speed": {},
        "failures": {},
    }
    results.mkdir(parents=True, exist_ok=True)
    file = results / file_name(result["device"])
    if file.exists() and len(parts) < len(PARTS):  # of other parts, if they ran on the same
        before = json.loads(file.read_text())
        if all(before.get(name) == result[name] for name in ("device", "versions")):
            result |= {name: before[name] for name in ("checks", "speed", "failures") if name in before}
    for part in parts:
        started = time.monotonic()
        result["failures"].pop(part, None)
        try:
            with tempfile.TemporaryDirectory() as folder:
                if part == CHECKS:
                    result["checks"] = [asdict(check) for check in run_checks()]
                else:
                    json_file = resolved_file(str(ROOT / "ds_configs/zero2.json"), Path(folder))
                    name, measured = measure_speed(part, "moe-680m", json_file)
                    result["speed"][name] = measured
        except Exception as error:  # whatever it is, the other parts have their own
            result["failures"][part] = first_line(error)
        print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
        file.write_text(json.dumps(result, indent=2) + "\n")
    write_table(page, results)
    return report(result, file)


def report(result: dict[str, Any], file: Path) -> bool:
    """Print what did not pass; returns whether nothing has failed."""
    for check in result["checks"]:
        if check["result"] != "passed":
            print(f"{check['result']}: {check['name']}")
    of_speed = {name: one["failure"] for name, one in result["speed"].items() if one["failure"]}
    failures = {**result["failures"], **of_speed}
    print("\n".join([*(f"{name}: {why}" for name, why in failures.items()), str(file)]))
    return not failures and all(check["result"] != "failed" for check in result["checks"])


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Check and measure megamoe on the GPUs of this host.",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run; the rest is kept")
    sys.exit(0 if run(ROOT / "docs/results", ROOT / "docs/results/performance.md", parser.parse_args().parts) else 1)


if __name__ == "__main__":
    cli.run(main)
