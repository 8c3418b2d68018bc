"""A plan as tables, at most 100 columns wide, in a terminal or a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import itemgetter

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.table import Table

from megamoe.config.phases import Phase
from megamoe.model.costs import active_parameter_count, parameter_count
from megamoe.planning.planner import Plan, split_keys
from megamoe.planning.report import LIMITS, RunTotals, advice, export_bytes, totals
from megamoe.planning.search import MICRO_BATCHES, kept_free
from megamoe.utils.text import duration, size

WIDTH = 100  # columns
BARS = ("",) * 4  # the columns of `add_bar`
BEST = 5  # splits that --best prints


def console() -> Console:
    """On stdout, without colours and with plain characters where it takes no others."""
    width = min(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def table(title: str, *heads: str, text: Sequence[int] = (0,), wide: int | None = None) -> Table:
    """An empty one, whose columns hold numbers, or text where they are among `text`, by place; that at `wide` takes all
    the width there is."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, show_header=any(heads))
    for place, head in enumerate(heads):
        made.add_column(head, justify="right" if place not in text else "left", header_style="", overflow="fold",
                        ratio=1 if place == wide else None)  # fmt: skip
    made.expand = wide is not None
    return made


def add_bar(to: Table, name: str, said: str, share: float, style: str = "cyan") -> None:
    to.add_row(name, said, ProgressBar(1, share, complete_style=style, finished_style=style), f"{share:.0%}")


def summary(plan: Plan, run: RunTotals | None) -> Table:
    """What a run is, takes and costs."""
    setup, time, model = plan.setup, plan.time, plan.setup.model
    who = "rank" if setup.on_cpu else "GPU"
    made = table(f"{plan.run.preset}, predicted", "", "", text=(0, 1), wide=1)
    most, or_more = plan.largest_micro_batch, " or more" * (plan.largest_micro_batch == MICRO_BATCHES[-1])
    rows = {
        "model": f"{parameter_count(model):,} parameters, {active_parameter_count(model):,} of them active per token",
        "split": f"{setup.world_size} rank{'s' * (setup.world_size > 1)} on {plan.device.name}, {plan.recipe.dtype}, "
        f"ep_size {setup.ep_size}, ZeRO-{setup.zero_stage}",
        "step": f"{time.tokens:,} tokens: {setup.micro_batch} x {setup.accumulation} samples of {setup.seq_len:,} "
        "tokens per rank",
        "run": f"no end in {plan.run.ds_config}; give --steps",
    }
    if run:
        epochs = "".join(f", {times:.3g} epochs of {path}" for path, times in run.epochs.items())
        cost = "" if run.cost is None else f", cost {run.cost:,.2f}"
        rows["run"] = f"{run.steps:,} steps, {run.tokens:,} tokens{epochs}"
        rows["time"] = f"{duration(run.seconds)}, {run.gpu_hours:,.1f} {who}-hours{cost}"
    rows |= {
        "speed": f"{time.tokens_per_second:,.0f} tokens/s, {1e3 * time.seconds:,.2f} ms per step, MFU {time.mfu:.1%}",
        "limited by": f"{LIMITS[time.limit]} ({time.parts[time.limit] / time.seconds:.0%} of a step)",
        "advice": advice(plan),
        "micro-batch": f"{setup.micro_batch}; up to {most}{or_more} leave {kept_free(setup):.0%} of the memory free",
        "checkpoint": f"{decimal(plan.checkpoint_bytes)}, {decimal(plan.footprint.saved)} per rank",
        "export": ", ".join(f"{decimal(count)} in {dtype}" for dtype, count in export_bytes(plan).items()),
    }
    for row in rows.items():
        made.add_row(*row)
    return made


def memory(plan: Plan) -> Table:
    """Bytes per rank by kind, those of the host too, and in all."""
    phases, device = totals(plan.footprint), plan.device.memory
    peak = max(("forward", "backward", "step"), key=lambda phase: phases[phase])
    made = table(f"predicted memory per rank, at the peak ({peak})", *BARS, text=(0, 2), wide=2)
    for kind, count in plan.footprint.peak.most_common():
        if count:
            add_bar(made, kind, size(count), count / phases["peak"])
    made.add_section()
    of_device = {f"total, {'fits' if plan.fits else 'DOES NOT FIT'} in {size(device)}": phases["peak"]}
    of_device["between two steps"] = phases["between"]
    if plan.larger_bucket:
        elements, lower = plan.larger_bucket
        of_device[f"if you set reduce_bucket_size to {elements}"] = lower
    for name, count in of_device.items():
        add_bar(made, name, size(count), count / device, "green" if count <= device else "red")
    host = plan.footprint.host
    made.add_section()
    for kind, count in host.most_common():
        add_bar(made, f"host: {kind}", size(count), count / host.total())
    if host:
        made.add_row("host: total, all the time", size(host.total()))
    return made


def splits(plan: Plan) -> Table:
    """The best of a search, and how to set the first."""
    title = f"best predicted of {len(plan.splits)} splits that leave {kept_free(plan.setup):.0%} of the memory free"
    heads = ("micro-batch x accumulation", "ep_size", "recomputed", "ZeRO", "memory", "tokens/s", "MFU")
    made = table(title, *heads, text=())
    for one in plan.splits[:BEST]:
        setup, time = one.setup, one.time
        recomputed = f"{setup.recompute_blocks} {setup.recompute if setup.recompute_blocks else ''}".strip()
        numbers = (f"{setup.micro_batch} x {setup.accumulation}", setup.ep_size, recomputed, setup.zero_stage)
        rates = (size(one.memory), f"{time.tokens_per_second:,.0f}", f"{time.mfu:.1%}")
        made.add_row(*map(str, numbers), *rates)
    return made


def how_to_split(plan: Plan) -> str:
    """How to set the best split."""
    keys = ", ".join(f'"{key}": {value}' for key, value in split_keys(plan.setup).items())
    samples = plan.setup.micro_batch * plan.setup.accumulation * plan.setup.world_size
    selective = " --recompute selective" * (plan.setup.recompute == "selective")
    return (
        f"set{' --compile' * plan.setup.compiled} --ep_size {plan.setup.ep_size} --recompute_blocks "
        f"{plan.setup.recompute_blocks}{selective}, and in {plan.run.ds_config}: {keys}\n"
        f'a step then has {samples:,} samples; with "train_batch_size" in the JSON the search keeps that number'
    )


def schedule(phases: Sequence[tuple[Phase, int | None, Plan]]) -> Table:
    """Each phase of a data schedule, its last step, and its plan."""
    made = table("predicted, by phase", "steps", "samples x seq_len", "memory", "ms per step", "tokens/s", "time", "")
    for phase, end, plan in phases:
        made.add_row(
            f"{phase.first_step}-{end or ''}",
            f"{phase.samples} x {phase.seq_len}",
            size(totals(plan.footprint)["peak"]),
            f"{1e3 * plan.time.seconds:,.2f}",
            f"{plan.time.tokens_per_second:,.0f}",
            duration((end - phase.first_step + 1) * plan.time.seconds) if end else "",
            "" if plan.fits else "DOES NOT FIT",
        )
    return made


def communication(plan: Plan) -> Table:
    heads = ("", "ranks", "calls", "payload", "in node", "to others", "ms")
    made = table("predicted communication per rank and step", *heads)
    for one in plan.collectives:
        inside, between = one.sent(plan.gpus_per_node)
        milliseconds = 1e3 * one.seconds(plan.device, plan.gpus_per_node, plan.rates.links)
        counts = (str(one.ranks), str(one.calls), size(one.payload), size(inside), size(between))
        made.add_row(f"{one.purpose} ({one.kind})", *counts, f"{milliseconds:.2f}")
    return made


def step_phases(plan: Plan) -> Table:
    """A step's phases."""
    made = table("predicted time per step, ms", "", "step", "host", "device", "limited by", text=(0, 4))
    for phase in plan.time.phases:
        columns = (phase.seconds, phase.launches, phase.device_seconds)
        made.add_row(phase.name, *(f"{1e3 * seconds:.2f}" for seconds in columns),
                     LIMITS[phase.limit] if phase.limit else "")  # fmt: skip
    return made


def step_time_bars(plan: Plan) -> Table:
    """What a step's time goes to."""
    time = plan.time
    made = table("predicted time per step by what it goes to, ms", *BARS, text=(0, 2), wide=2)
    for part, seconds in sorted(time.parts.items(), key=itemgetter(1), reverse=True):
        add_bar(made, LIMITS[part], f"{1e3 * seconds:.2f}", seconds / time.seconds)
    return made
