"""Check this host before a run: what it lacks, and whether the run fits in its memory and on its disk."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megamoe.commands.options import Doctor
from megamoe.config.precision import precision_of
from megamoe.config.run import RunConfig
from megamoe.launch.host_checks import GIB, Finding, host_findings, judged
from megamoe.launch.local import default_ranks
from megamoe.launch.network import is_free
from megamoe.launch.preflight import needed_files
from megamoe.planning.options import PlanOptions
from megamoe.planning.planner import Plan, make_plan
from megamoe.utils.data_sheets import DEVICES
from megamoe.utils.disk import existing_folder
from megamoe.utils.errors import Problems
from megamoe.utils.hardware import describe_flops, measured_flops
from megamoe.utils.host_memory import memory_limits
from megamoe.utils.json_files import write_json
from megamoe.utils.text import size

COLORS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(options: Doctor) -> None:
    run = RunConfig(**options.model_dump(include=RunConfig.model_fields.keys() & options.model_fields_set))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device, ranks = torch.device("cuda" if on_gpu else "cpu"), options.ranks or default_ranks()
    problems = Problems()
    plan: Plan | None = problems.attempt(plan_of, run, device, ranks, options.hosts)
    compiles = run.compile or bool(plan and plan.recipe.operator_builder)
    found = [*host_findings(run.folder, ranks, compiles), *run_findings(run, device)]
    found += plan_findings(plan, device, ranks) if plan else []
    found += [Finding("error", "configuration", problem.rstrip(".")) for problem in problems]
    show(found)
    if options.json_file:
        write_json(options.json_file, {"findings": [asdict(one) for one in found]})
    if any(one.severity == "error" for one in found):
        sys.exit(2)


def plan_of(run: RunConfig, device: torch.device, ranks: int, hosts: int) -> Plan:
    """The plan of a run on this host and others like it. Raises UserError."""
    name = "cpu"
    if device.type == "cuda":
        of_gpu = torch.cuda.get_device_name(device).lower()
        name = next((known for known in DEVICES if known in of_gpu), "a100")  # bytes are those of any
    return make_plan(run, PlanOptions(gpus=ranks * hosts, gpus_per_node=ranks, device=name))


def run_findings(run: RunConfig, device: torch.device) -> Iterator[Finding]:
    """What this host computes fast, and what the run is given."""
    found = precision_of(device)
    rates = [measured_flops(device, dtype) for dtype in (torch.bfloat16, torch.float32)] if device.type != "cpu" else []
    value = f"{found.faster}: {found.reason}{''.join(f', {describe_flops(rate)}' for rate in rates)}"
    yield judged(0 in rates, "precision", value, "", "install a torch that is built for this GPU", True)
    if run.model_fields_set & {"data", "data_schedule"}:
        absent = [str(path) for path in needed_files(run) if not path.exists()]
        remedy = "give --data as megamoe prepare made it"
        yield judged(bool(absent), "files", f"{', '.join(absent) or 'none'} absent", "", remedy, True)
    port = os.environ.get("MASTER_PORT", "")
    if port.isdecimal():
        yield judged(not is_free(int(port)), "MASTER_PORT", port, "a free port", "leave it out", True)


def plan_findings(plan: Plan, device: torch.device, ranks: int) -> Iterator[Finding]:
    """Whether what the planner predicts fits on this host."""
    run, peak, on_gpu = plan.run, plan.footprint.peak.total() / GIB, device.type == "cuda"
    limit, available = (one / GIB for one in memory_limits())
    what, remedy = f"memory for {run.preset}", "choose a smaller --preset (tiny-plus) or micro-batch, or more hosts"
    if on_gpu:
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        yield judged(peak > total, what, f"{total:.1f} GiB per GPU", f"{peak:.1f} GiB predicted", remedy, True)
    needed = ranks * (plan.footprint.host.total() / GIB if on_gpu else peak)
    value, predicted = f"{available:.1f} GiB free of {limit:.1f} on this host", f"{needed:.1f} GiB predicted"
    yield judged(needed > available, what, value, f"{predicted} for {ranks} ranks", remedy, needed > limit)
    saved, free = plan.checkpoint_bytes, shutil.disk_usage(existing_folder(run.folder)).free
    count = checkpoints_of(run, plan.recipe.schedule.total_steps)
    predicted = f"{size(count * saved)} for {count} checkpoint{'s' * (count > 1)} of {size(saved)}, predicted"
    remedy = "give --keep_last, a larger --save_interval, or a --run_dir with more space"
    is_hopeless = min(count, 2) * saved > free
    yield judged(count * saved > free, "disk", f"{size(free)} free", predicted, remedy, is_hopeless)


def checkpoints_of(run: RunConfig, total_steps: int | None) -> int:
    """How many a run has at most at a time, with the one that is being written."""
    last = run.steps or run.schedule_steps or total_steps or run.save_interval
    saves = math.ceil(last / run.save_interval) if run.save_interval else 1
    every = last // run.keep_every if run.keep_every else 0
    return min(saves, run.keep_last + every + 1) if run.keep_last else saves


def show(findings: list[Finding]) -> None:
    """A table on a terminal, else lines."""
    table = Table("", "", "found", "needed", "to do", box=None)
    for one in findings:
        table.add_row(Text(one.severity, COLORS[one.severity]), one.what, one.value, one.needed, one.remedy)
        if not sys.stdout.isatty():
            print(f"{one.severity}: {one}")
    if sys.stdout.isatty():
        Console(markup=False).print(table)
