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
from megamoe.utils.errors import UserError
from megamoe.utils.hardware import describe_flops, measured_flops
from megamoe.utils.host_memory import memory_limits
from megamoe.utils.json_files import write_json

COLORS = {"ok": "green", "warning": "yellow", "error": "red"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def doctor(options: Doctor) -> None:
    run = RunConfig(**options.model_dump(include=set(RunConfig.model_fields) & options.model_fields_set))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device, ranks = torch.device("cuda" if on_gpu else "cpu"), options.ranks or default_ranks()
    found, plan = [], None
    try:
        plan = plan_of(run, device, ranks, options.hosts)
        found = list(plan_findings(plan, device, ranks))
    except UserError as error:
        found = [Finding("error", "configuration", problem.rstrip(".")) for problem in error.problems]
    compiles = run.compile or bool(plan and plan.recipe.operator_builder)
    found = [*host_findings(run.folder, ranks, compiles), *run_findings(run, device), *found]
    show(found)
    if options.json_file:
        write_json(options.json_file, {"findings": [asdict(one) for one in found]})
    if any(one.severity == "error" for one in found):
        sys.exit(2)


def plan_of(run: RunConfig, device: torch.device, ranks: int, hosts: int) -> Plan:
    """The plan of a run on this host and others like it. Raises UserError."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else "cpu"
    known = next((key for key in DEVICES if key in name), "a100")  # whose bytes are those of any
    return make_plan(
        run, PlanOptions(gpus=ranks * hosts, gpus_per_node=ranks, device=known if device.type == "cuda" else "cpu")
    )


def run_findings(run: RunConfig, device: torch.device) -> Iterator[Finding]:
    """What this host computes fast, and what the run is given."""
    precision = precision_of(device)
    rates = {name: measured_flops(device, dtype) for name, dtype in DTYPES.items()} if device.type == "cuda" else {}
    shown = "".join(f"; {name} GEMMs run at {describe_flops(rate)}" for name, rate in rates.items())
    value, remedy = f"{precision.faster}: {precision.reason}{shown}", "install a torch that is built for this GPU"
    yield judged(rates.get(precision.faster) == 0, "precision", value, "", remedy, True)
    if run.model_fields_set & {"data", "data_schedule"}:
        for path in needed_files(run):
            if not path.exists():
                yield Finding("error", "data", f"{path} does not exist", "", "give --data as megamoe prepare made it")
    port = os.environ.get("MASTER_PORT", "")
    if port.isdecimal():
        yield judged(not is_free(int(port)), "MASTER_PORT", port, "a free port", "leave it out", True)


def plan_findings(plan: Plan, device: torch.device, ranks: int) -> Iterator[Finding]:
    """Whether what the planner predicts fits on this host."""
    run, peak = plan.run, plan.footprint.peak.total()
    limit, available = memory_limits()
    smaller = "choose a smaller --preset (tiny-plus), a smaller micro-batch, or more hosts"
    what = f"memory for {run.preset}, predicted, tensors alone"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        remedy = f"{smaller}, or give --recompute_blocks"
        yield judged(peak > total, what, f"{total / GIB:.1f} GiB per GPU", f"{peak / GIB:.1f} GiB", remedy, True)
    needed = ranks * (plan.footprint.host.total() if device.type == "cuda" else peak)
    if needed:
        value = f"{available / GIB:.1f} GiB available of {limit / GIB:.1f} GiB on this host"
        shown, remedy = f"{needed / GIB:.1f} GiB for {ranks} ranks", f"{smaller}, or end what takes it"
        yield judged(needed > available, what, value, shown, remedy, needed > limit)
    size, free = plan.checkpoint_bytes, shutil.disk_usage(existing_folder(run.folder)).free
    count = checkpoints_of(run, plan.recipe.schedule.total_steps)
    shown = f"{count * size / GIB:.1f} GiB for {count} checkpoints of {size / GIB:.1f} GiB, predicted"
    remedy = "give --keep_last, a larger --save_interval, or a --run_dir with more space"
    value, is_hopeless = f"{free / GIB:.1f} GiB free", min(count, 2) * size > free
    yield judged(count * size > free, "disk for checkpoints", value, shown, remedy, is_hopeless)


def checkpoints_of(run: RunConfig, total_steps: int | None) -> int:
    """How many a run has at most at a time, with the one that is being written."""
    last = run.steps or run.schedule_steps or total_steps or run.save_interval
    saves = math.ceil(last / run.save_interval) if run.save_interval else 1
    if not run.keep_last:
        return saves
    every = last // run.keep_every if run.keep_every else 0
    return min(saves, run.keep_last + every + 1)


def show(findings: list[Finding]) -> None:
    """A table on a terminal, else lines."""
    if not sys.stdout.isatty():
        print("\n".join(f"{one.severity}: {one}" for one in findings))
        return
    table = Table("", "", "found", "needed", "to do", box=None)
    for one in findings:
        color = COLORS[one.severity]
        table.add_row(f"[{color}]{one.severity}[/]", one.what, one.value, one.needed, one.remedy)
    Console().print(table)
