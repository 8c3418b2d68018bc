"""Predict of a run on many GPUs the bytes that a rank needs, what it sends to whom, and the time of a step."""

from __future__ import annotations

from operator import itemgetter

from megamoe.commands.options import Plan as PlanCommand
from megamoe.config.phases import Phase, phases_of
from megamoe.config.run import RunConfig, RunShape
from megamoe.model.costs import parameter_count
from megamoe.planning.options import PlanOptions
from megamoe.planning.planner import GIB, Plan, make_plan, split_keys
from megamoe.planning.report import LIMITS, advice, as_json, assumptions, totals
from megamoe.planning.search import kept_free
from megamoe.utils.json_files import write_json
from megamoe.utils.text import duration

UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}
BEST = 5  # splits that --best prints


def size(count: float) -> str:
    unit = next((unit for unit in UNITS if count >= UNITS[unit]), "B")
    return f"{count / UNITS[unit]:9.2f} {unit:3s}" if unit != "B" else f"{count:9.0f} B  "


def print_memory(plan: Plan) -> None:
    phases = totals(plan.footprint)
    peak = max(("forward", "backward", "step"), key=lambda phase: phases[phase])
    print(f"\npredicted memory per rank, at the peak ({peak})")
    for kind, count in plan.footprint.peak.items():
        if count:
            print(f"  {kind:32s}{size(count)}")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    print(f"  {'total':32s}{size(phases['peak'])}  {verdict} in {plan.device.memory / GIB:.1f} GiB")
    print(f"  {'between two steps':32s}{size(phases['between'])}")
    if plan.larger_bucket:
        elements, lower = plan.larger_bucket
        print(f"  {'with larger reduction buckets':32s}{size(lower)}  set reduce_bucket_size to {elements}")
    if plan.footprint.host:
        print("\npredicted host memory per rank, all the time")
        for kind, count in plan.footprint.host.items():
            print(f"  {kind:32s}{size(count)}")
        print(f"  {'total':32s}{size(plan.footprint.host.total())}")


def print_communication(plan: Plan) -> None:
    print("\npredicted communication per rank and step")
    print(f"  {'':48s}{'ranks':>6s}{'calls':>7s}{'payload':>14s}{'sent in node':>14s}{'to others':>14s}{'ms':>9s}")
    for one in plan.collectives:
        inside, between = one.sent(plan.gpus_per_node)
        milliseconds = 1e3 * one.seconds(plan.device, plan.gpus_per_node, plan.rates.links)
        print(
            f"  {one.purpose + ' (' + one.kind + ')':48s}{one.ranks:6d}{one.calls:7d} {size(one.payload)} "
            f"{size(inside)} {size(between)}{milliseconds:9.2f}"
        )


def print_time(plan: Plan) -> None:
    time = plan.time
    print(f"\n{'predicted time per step, ms':24s}{'step':>12s}{'host':>9s}{'device':>9s}  limited by")
    for phase in time.phases:
        columns = (phase.seconds, phase.launches, phase.device_seconds)
        milliseconds = "".join(f"{1e3 * seconds:9.2f}" for seconds in columns)
        print(f"  {phase.name:25s}{milliseconds}  {LIMITS[phase.limit] if phase.limit else ''}".rstrip())
    print(f"  {'step':25s}{1e3 * time.seconds:9.2f}")
    for part, seconds in sorted(time.parts.items(), key=itemgetter(1), reverse=True):
        print(f"    {LIMITS[part]:50s}{1e3 * seconds:9.2f} {seconds / time.seconds:5.0%}")
    rate = time.tokens_per_second
    print(f"  predicted: {time.tokens:,} tokens per step, {rate:,.0f} tokens/s, {rate * 86_400:.4g} tokens per day, "
          f"MFU {time.mfu:.1%}; a billion tokens in {duration(1e9 / rate)}")  # fmt: skip
    print(f"  limited by {LIMITS[time.limit]}: {advice(plan)}")


def print_splits(plan: Plan) -> None:
    print(f"\nbest predicted of {len(plan.splits)} splits that leave {kept_free(plan.setup):.0%} of the memory free")
    print(f"  {'micro-batch':>11s}{'accumulation':>13s}{'ep_size':>8s}{'recomputed':>14s}{'ZeRO':>5s}{'memory':>14s}"
          f"{'tokens/s':>13s}{'MFU':>7s}  limited by")  # fmt: skip
    for one in plan.splits[:BEST]:
        setup, time = one.setup, one.time
        recomputed = f"{setup.recompute_blocks} {setup.recompute if setup.recompute_blocks else ''}".strip()
        print(f"  {setup.micro_batch:11d}{setup.accumulation:13d}{setup.ep_size:8d}{recomputed:>14s}"
              f"{setup.zero_stage:5d} {size(one.memory)}{time.tokens_per_second:13,.0f}{time.mfu:7.1%}  "
              f"{LIMITS[time.limit]}")  # fmt: skip
    keys = ", ".join(f'"{key}": {value}' for key, value in split_keys(plan.setup).items())
    samples = plan.setup.micro_batch * plan.setup.accumulation * plan.setup.world_size
    selective = " --recompute selective" * (plan.setup.recompute == "selective")
    print(f"  set{' --compile' * plan.setup.compiled} --ep_size {plan.setup.ep_size} --recompute_blocks "
          f"{plan.setup.recompute_blocks}{selective}, and in {plan.run.ds_config}: {keys}")  # fmt: skip
    print(f'  a step then has {samples:,} samples; with "train_batch_size" in the JSON the search keeps that number')


def plan_phases(plan: Plan) -> list[tuple[Phase, int | None, Plan]]:
    """Each phase of the run's data schedule, its last step, and its plan. Raises UserError."""
    run = plan.run
    if not run.data_schedule:
        return []
    of_run = phases_of(run, plan.recipe, plan.setup.model)
    phases, last_step = of_run.all, plan.recipe.in_steps(of_run.step_after).schedule.total_steps
    plans = [
        make_plan(
            run.model_copy(update={"seq_len": one.seq_len}),
            plan.options.model_copy(
                update={"micro_batch": one.micro_batch, "accumulation": one.accumulation, "best": False}
            ),
        )
        for one in phases
    ]
    return list(zip(phases, [*(one.first_step - 1 for one in phases[1:]), last_step], plans, strict=True))


def print_phases(phases: list[tuple[Phase, int | None, Plan]]) -> None:
    print("\npredicted, by phase")
    print(f"  {'steps':>17s}{'samples x seq_len':>20s}{'memory':>14s}{'ms per step':>13s}{'tokens/s':>13s}  time")
    for phase, end, plan in phases:
        steps, samples = f"{phase.first_step}-{end or ''}", f"{phase.samples} x {phase.seq_len}"
        took = duration((end - phase.first_step + 1) * plan.time.seconds) if end else ""
        print(
            f"  {steps:>17s}{samples:>20s}{size(totals(plan.footprint)['peak']):>14s}{1e3 * plan.time.seconds:13.2f}"
            f"{plan.time.tokens_per_second:13,.0f}  {took}{'' if plan.fits else '  DOES NOT FIT'}"
        )


def plan_of(options: PlanCommand) -> Plan:
    run = RunConfig(**options.model_dump(include=set(RunShape.model_fields)))
    of_plan = PlanOptions(**options.model_dump(include=set(PlanOptions.model_fields)))
    return make_plan(run, of_plan)


def plan(options: PlanCommand) -> None:
    plan = plan_of(options)
    phases, setup = plan_phases(plan), plan.setup
    print(
        f"{plan.run.preset}: {parameter_count(setup.model):,} parameters, {setup.world_size} "
        f"rank{'s' * (setup.world_size > 1)} on {plan.device.name}, {plan.recipe.dtype}, ep_size {setup.ep_size}, "
        f"ZeRO-{setup.zero_stage}; "
        f"{setup.micro_batch} x {setup.accumulation} samples of {setup.seq_len} tokens per rank and step"
    )
    if plan.splits:
        print_splits(plan)
    print_memory(plan)
    print_communication(plan)
    print_time(plan)
    if phases:
        print_phases(phases)
    print("\nassumed")
    for sentence in assumptions(plan):
        print(f"  {sentence}")
    if options.json_file:
        write_json(options.json_file, as_json(plan))
