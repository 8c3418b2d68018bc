"""Pretrain a model, as one of the ranks that `megamoe train`, `deepspeed`, torchrun or srun starts.

Join the other ranks, check everything at once, build, restore, train, close. `--help` lists the options; each is a
field of RunConfig.
"""

from __future__ import annotations

import signal
import sys

from megamoe.utils.interrupts import on_interrupt
from megamoe.utils.quiet import quiet_deepspeed

if __name__ == "__main__":  # while the rest is loaded
    on_interrupt(signal.SIG_DFL)
    if "--verbose" not in sys.argv:
        quiet_deepspeed()

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from megamoe.checkpoint import folders
from megamoe.checkpoint.restore import first_verified, restore_first_verified
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config import cli
from megamoe.config.model import ModelConfig
from megamoe.config.phases import phases_of
from megamoe.config.precision import Precision, find_precision
from megamoe.config.recipe import Choice, Recipe, parse_recipe
from megamoe.config.run import RunConfig, parse_run
from megamoe.config.run_checks import chosen_trackers, length_problems, run_problems
from megamoe.data.batches import TrainData
from megamoe.dry_run import dry_run
from megamoe.evaluation.held_out import Evaluator
from megamoe.evaluation.tasks import TaskEvaluator
from megamoe.formats.config_json import find_preset
from megamoe.launch.codes import STOPPED
from megamoe.launch.determinism import make_deterministic
from megamoe.launch.distributed import init_distributed, raise_on_any_rank
from megamoe.launch.exits import code_of, end_groups, leave, message_of
from megamoe.launch.stopping import Deadline, StopRequest
from megamoe.launch.watch import Position, Watch
from megamoe.model.compiled import compiler_problems
from megamoe.model.placement import placement_problems
from megamoe.monitoring.alerts import Alerts
from megamoe.monitoring.ends import tell_failure, tell_unseen_death
from megamoe.monitoring.sink import Sink
from megamoe.monitoring.sinks import SinkGroup, make_sinks
from megamoe.planning.sharding import setup_of
from megamoe.planning.traffic import describe_traffic
from megamoe.resume import Start, check_changes, find_start
from megamoe.run_inputs import Checked, open_inputs
from megamoe.run_record import first_lines, make_record
from megamoe.training.collectives import Collectives
from megamoe.training.engine import deepspeed_own_problems
from megamoe.training.guard import Guard
from megamoe.training.loop import Trainer
from megamoe.training.rollback import saved_guard
from megamoe.training.step import TrainStep, build_train_step
from megamoe.training.weight_average import WeightAverage
from megamoe.utils.errors import Problems
from megamoe.utils.json_files import read_json
from megamoe.utils.run_folder import RunFolder


def main() -> None:
    on_interrupt(signal.default_int_handler)
    if "--help" in sys.argv or "-h" in sys.argv:
        with contextlib.suppress(SystemExit):
            parse_run()
        sys.stdout.flush()
        leave(0)
    # The reader of our lines, a launcher or an ssh connection, may exit while the ranks still have to save.
    sys.stdout, sys.stderr = cli.Console(sys.stdout), cli.Console(sys.stderr)
    try:
        code = pretrain()
    except BaseException as error:  # while no `Watch` tells the others of it
        code = code_of(error)
        if message := message_of(error):
            print(message, file=sys.stderr)
    # Everything is written and closed. Without this, threads that libraries have left behind now and then abort the
    # process while it is taken down ("terminate called without an active exception"), and ranks would be slow enough to
    # be ended by a launcher that has seen the first one exit.
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)


def pretrain() -> int:
    """A run from joining the other ranks to its end; returns this rank's exit code."""
    problems = Problems()
    config = problems.attempt(parse_run)
    if config and config.deterministic:
        make_deterministic()
    rendezvous, device = init_distributed()
    stop = StopRequest()  # until here a signal ends the process at once
    position = Position()
    watch = Watch(rendezvous, position)
    try:
        checked = check(config, problems, device, is_first_on_host=rendezvous.rank_info.local_rank == 0)
        watch.collective_seconds = checked.run.collective_timeout
        if not checked.run.dry_run:
            alerts = Alerts(checked.run.on_event, checked.run.folder)
            watch.on_failure = lambda *failure: tell_failure(alerts, checked.run.folder, position.step, *failure)
        starts = run_dry if checked.run.dry_run else run
        done = is_done(checked) or starts(checked, rendezvous.store, position, stop)
        code = 0 if done else STOPPED
    except SystemExit as end:  # on all ranks
        code = int(end.code or 0)
    except BaseException as error:  # on this rank
        watch.fail(error)
    watch.close()
    end_groups()
    return code


def check(config: RunConfig | None, problems: Problems, device: torch.device, is_first_on_host: bool) -> Checked:
    """The run that the command line asks for. Problems of any rank end all of them together. Collective.

    Args:
        config: None where the command line has `problems`.
    """
    checked = None
    resumes = config and (config.resume or config.auto_resume)
    precision = find_precision(device, config.folder if config and resumes else None)
    if config:
        checked = problems.attempt(
            check_run, config, dist.get_world_size(), device, precision, dist.get_rank() == 0, is_first_on_host
        )
    raise_on_any_rank(problems)
    assert checked
    return checked


def check_run(
    run: RunConfig, world_size: int, device: torch.device, precision: Precision, leads: bool = True, scans: bool = True
) -> Checked:
    """Everything that can be checked before anything is built or written. Raises one UserError with all problems.

    Args:
        precision: says what "auto" in the DeepSpeed JSON stands for.
        leads: this rank locks the run folder, and checks what the run resumes or starts from, for all ranks.
        scans: this rank checks the tokens of the corpora, for all ranks of its host.
    """
    problems = Problems()
    start = find_start(run, problems) if leads else Start()
    recipe = _recipe_of(run, problems, world_size, device.type == "cpu", precision.choice)
    model: ModelConfig = problems.attempt(find_preset, run.preset)
    problems += run_problems(run, model, recipe)
    if model:
        seq_len = run.seq_len or model.max_position_embeddings
        problems += placement_problems(model, run.ep_size, recipe.dtype if recipe else "fp32", world_size, run.preset)
        phases = problems.attempt(phases_of, run, recipe, model) if isinstance(recipe, Recipe) else None
        if phases and recipe.tokens:
            recipe = problems.attempt(recipe.in_steps, phases.step_after)
            problems += length_problems(run, recipe.schedule) if recipe else []
        inputs = problems.attempt(open_inputs, run, model, seq_len, phases, start.initial_weights, leads, scans)
    if run.compile:
        problems += compiler_problems(device)
    if not problems:
        problems += deepspeed_own_problems(recipe)
    problems.refuse()
    last_step = run.steps or recipe.schedule.total_steps
    assert last_step, "length_problems"
    assert phases
    data = TrainData(phases, inputs.sources, run.seed, model.document_attention)
    checked = Checked(run, model, recipe, precision, device, last_step, inputs, data, start)
    record = make_record(checked)
    changes = check_changes(run, start, record)
    record |= {"replaced_data": changes.replaced} if changes.replaced else {}
    return replace(checked, record=record, changes=changes)


def _recipe_of(run: RunConfig, problems: Problems, world_size: int, on_cpu: bool, auto: Choice) -> Any:
    """The Recipe that a run trains by; where it has problems, what `parse_recipe` makes of it, if it can be read."""
    json = problems.attempt(read_json, Path(run.ds_config))
    if json is None:
        return None
    recipe = parse_recipe(json, run.ds_config, world_size, on_cpu, auto, problems)
    schedule = getattr(recipe, "schedule", None)
    if getattr(recipe, "tokens", None):
        if run.schedule_steps:
            problems.append(f"schedule_steps is {run.schedule_steps}, but {run.ds_config} counts tokens; leave it out.")
    elif schedule:
        problems += length_problems(run, schedule)
    if isinstance(recipe, Recipe) and run.schedule_steps and recipe.schedule.total_steps and not recipe.tokens:
        return problems.attempt(recipe.replaced, {"scheduler.params.total_num_steps": run.schedule_steps})
    return recipe


def is_done(checked: Checked) -> bool:
    """Whether a checkpoint of the last step, or a later one, is verified. Collective."""
    candidates, folder, last_step = checked.start.candidates, checked.run.folder, checked.last_step
    claims = [any((folders.step_of(path) or 0) >= last_step for path in filter(folders.is_complete, candidates))]
    dist.broadcast_object_list(claims)  # rank 0 decides, by names
    if not claims[0]:
        return False
    problems = Problems()
    newest: Path | None = problems.attempt(first_verified, candidates)
    step = folders.step_of(newest) if newest else None
    if newest in candidates:
        del candidates[: candidates.index(newest)]  # which need not be looked at again
    if step is not None and step >= last_step and not checked.run.auto_resume:
        problems.append(
            f"{folder} is at step {step} already and the run ends at {last_step}; to train on, raise --steps and the "
            "end of the schedule, if it has one."
        )
    raise_on_any_rank(problems)
    if step is None or step < last_step:
        return False
    if dist.get_rank() == 0:
        print(f"{folder} is at its last step, {step}, already", flush=True)
    return True


def run_dry(checked: Checked, store: Store | None, position: Position, stop: StopRequest) -> bool:
    """A dry run, with the arguments of `run`. Collective."""

    def train(folder: Path, sink: Sink) -> bool:
        start = replace(checked.start, folder=RunFolder(folder) if checked.start.folder else None)
        config = checked.run.model_copy(update={"run_dir": str(folder)})
        return run(replace(checked, start=start, run=config), store, position, stop, [sink])

    return dry_run(checked.run.folder, checked.device, train)


def run(
    checked: Checked, store: Store | None, position: Position, stop: StopRequest, sinks_only: Sequence[Sink] = ()
) -> bool:
    """Build, restore, train. Returns whether the last step was reached. Collective.

    Args:
        store: that all ranks share; None for a single rank.
        position: is told where this rank is.
        stop: asks for an end before the last step.
        sinks_only: in place of all that there are.
    """
    config, recipe, inputs, start = checked.run, checked.recipe, checked.inputs, checked.start
    peak = checked.precision.mfu_peak(checked.device, recipe.torch_dtype)  # before the model takes the memory
    position.at("building the engine")
    with stop.interrupting():  # there is nothing to save, and a compiler may run for minutes
        train_step = build_train_step(
            checked.model, recipe, ep_size=config.ep_size, seed=config.seed, recompute_blocks=config.recompute_blocks,
            recompute=config.recompute, compiled=config.compile, ema_decay=config.ema_decay,
            num_sources=len(checked.data.source_names),
        )  # fmt: skip
    position.at("restoring")
    checkpoint = restore(train_step, start.candidates, start.initial_weights)
    first = (folders.step_of(checkpoint) or 0) if checkpoint else 0
    guard = Guard(config, recipe.schedule.warmup_steps)
    if checkpoint:
        guard.restore(saved_guard(checkpoint), first)
    ledger = [start.ledger]
    dist.broadcast_object_list(ledger)  # rank 0 has read it
    evaluates = not config.dry_run
    with contextlib.closing(enter_folder(checked, first, checkpoint, train_step.average, sinks_only)) as sinks:
        writer = CheckpointWriter(
            train_step.engine, config.folder / "checkpoints", checked.record, store=store, keep_last=config.keep_last,
            keep_every=config.keep_every, background=not config.foreground_save, resumed=checkpoint, ledger=ledger[0],
            waiting=lambda: position.at("saving"), saved=partial(sinks.log_event, "save"),
        )  # fmt: skip
        collectives = Collectives() if recipe.counts_collectives else None
        trainer = Trainer(
            train_step=train_step, data=checked.data, writer=writer, seed=config.seed, guard=guard,
            ledger=ledger[0], position=position, stop=stop, peak=peak, deadline=Deadline(config.time_limit, os.environ),
            evaluator=Evaluator(inputs.held_out, config.eval_samples) if inputs.held_out and evaluates else None,
            tasks=TaskEvaluator(inputs.tasks, position.at) if config.lm_eval_tasks and evaluates else None,
            sampler=inputs.sampler if evaluates else None, collectives=collectives or contextlib.nullcontext(),
            sinks=sinks, folder_is_gone=start.folder.is_gone if start.folder else lambda: False,
        )  # fmt: skip
        reached = trainer.run(
            first, first + 1 if config.dry_run else checked.last_step, log_every=config.log_interval,
            eval_every=config.eval_interval, save_every=config.save_interval, tasks_every=config.lm_eval_interval,
        )  # fmt: skip
        if collectives and collectives.entered:
            of_step = describe_traffic(collectives, setup_of(config, checked.model, recipe, checked.data))
            sinks.log_text(train_step.engine.global_steps, of_step)
    return reached


def enter_folder(
    checked: Checked, first: int, checkpoint: Path | None, average: WeightAverage | None, sinks_only: Sequence[Sink]
) -> SinkGroup:
    """Write the record of the start, or of the resume from `checkpoint`, and tell of it; returns the sinks, of which
    rank 0 alone has any. Arguments as of `run` and `first_lines`."""
    run, folder, of_start = checked.run, checked.start.folder, {"checkpoint": checkpoint and checkpoint.name}
    if not folder:
        return SinkGroup([])
    folder.enter({"step": first, **of_start, **checked.record}, checked.inputs.tokenizer_files)
    trackers = chosen_trackers(run, checked.recipe)
    sinks = SinkGroup(sinks_only or [*make_sinks(trackers), Alerts(run.on_event, run.folder)])
    sinks.open(run.folder, first, checked.record)
    tell_unseen_death(sinks, run.folder)
    sinks.log_event("resume" if checked.start.is_resuming else "start", first, of_start)
    for line in first_lines(checked, first, checkpoint, average):
        sinks.log_text(first, line)
    return sinks


def restore(train_step: TrainStep, candidates: list[Path], initial_weights: list[Path]) -> Path | None:
    """Give the engine what the run starts from, if that is not drawn; returns the checkpoint that it resumes from.
    Problems of any rank end all of them together. Collective."""
    problems = Problems()
    checkpoint: Path | None = problems.attempt(restore_first_verified, train_step.engine, candidates)
    if not checkpoint and not problems:
        problems.attempt(restore_first_verified, train_step.engine, initial_weights, True)  # weights alone
    raise_on_any_rank(problems)
    return checkpoint


if __name__ == "__main__":
    main()
