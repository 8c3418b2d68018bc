"""Predict of a run on many GPUs the bytes that a rank needs, what it sends to whom, and the time of a step."""

from __future__ import annotations

from rich.padding import Padding

from megamoe.commands.options import Plan as PlanCommand
from megamoe.config.phases import Phase, Phases, phases_of
from megamoe.config.run import RunConfig, RunShape
from megamoe.data.sources import open_source
from megamoe.planning import tables
from megamoe.planning.options import PlanOptions
from megamoe.planning.planner import Plan, make_plan
from megamoe.planning.report import RunTotals, as_json, assumptions
from megamoe.run_inputs import locations
from megamoe.run_record import times_read
from megamoe.utils.json_files import write_json


def plan_phases(plan: Plan, of_run: Phases, last_step: int | None) -> list[tuple[Phase, int | None, Plan]]:
    """Each phase of a run, its last step, and its plan. Raises UserError."""
    run, phases = plan.run, of_run.all
    if len(phases) == 1 and not run.data_schedule:
        return [(phases[0], last_step, plan)]
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


def epochs(plan: Plan, of_run: Phases, last_step: int) -> dict[str, float]:
    """How often the run reads each corpus of --data, by its path. Raises UserError."""
    if not plan.options.data:
        return {}
    wanted = {(one.path, phase.seq_len) for phase in of_run.all for one in phase.data}
    found = locations(plan.run, [path for path, _ in wanted])
    vocab_size = plan.setup.model.vocab_size
    sources = {(path, length): open_source(found[path], length, vocab_size, False) for path, length in wanted}
    return times_read(of_run, sources, last_step)


def run_totals(plan: Plan) -> tuple[RunTotals | None, list[tuple[Phase, int | None, Plan]]]:
    """What the run takes in all, if it has an end, and its phases. Raises UserError."""
    of_run = phases_of(plan.run, plan.recipe, plan.setup.model)
    last_step = plan.run.steps or plan.recipe.in_steps(of_run.step_after).schedule.total_steps
    phases = plan_phases(plan, of_run, last_step)
    if last_step is None:
        return None, phases
    seconds = sum(
        max(min(end or 0, last_step) - one.first_step + 1, 0) * part.time.seconds for one, end, part in phases
    )
    hours, price = seconds / 3600 * plan.setup.world_size, plan.options.price_per_gpu_hour
    cost = None if price is None else hours * price
    tokens = of_run.tokens_before(last_step + 1)
    return RunTotals(last_step, tokens, seconds, hours, cost, epochs(plan, of_run, last_step)), phases


def plan_of(options: PlanCommand) -> Plan:
    run = RunConfig(**options.model_dump(include={*RunShape.model_fields, "steps"}))
    run = run.model_copy(update={"data": options.data} if options.data else {})
    return make_plan(run, PlanOptions(**options.model_dump(include=set(PlanOptions.model_fields))))


def plan(options: PlanCommand) -> None:
    plan = plan_of(options)
    run, phases = run_totals(plan)
    console = tables.console()
    if plan.splits:
        console.print(tables.splits(plan), tables.how_to_split(plan), sep="\n")
    console.print(tables.summary(plan, run), tables.memory(plan), sep="\n")
    if plan.run.data_schedule:
        console.print(tables.schedule(phases))
    if options.verbose:
        console.print(tables.communication(plan), tables.step_phases(plan), tables.step_time_bars(plan), sep="\n")
        console.print("assumed", *(Padding(sentence, (0, 0, 0, 2)) for sentence in assumptions(plan)), sep="\n")
    if options.json_file:
        write_json(options.json_file, as_json(plan, run))
