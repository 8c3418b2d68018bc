"""Pretrain a model: `deepspeed --num_gpus 8 megamoe/pretrain.py --ds_config ds_configs/zero2.json`.

Join the other ranks, check everything at once, build, restore, train, close. `--help` lists the options; each is a
field of RunConfig.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store

from megamoe.checkpoint import folders
from megamoe.checkpoint.restore import first_verified, restore_first_verified
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config import cli
from megamoe.config.precision import find_precision
from megamoe.config.recipe import DTYPES, dtype_of
from megamoe.config.run import RunConfig, parse_run
from megamoe.data.ledger import DataLedger
from megamoe.job import Job
from megamoe.launch.determinism import make_deterministic
from megamoe.launch.distributed import init_distributed, raise_on_any_rank
from megamoe.launch.exits import STOPPED, code_of, end_groups, leave, words_of
from megamoe.launch.stopping import Deadline, StopRequest
from megamoe.launch.watch import Position, Watch
from megamoe.training.guard import Guard, GuardSettings
from megamoe.training.loop import Trainer
from megamoe.training.rollback import saved_guard
from megamoe.training.sinks import SinkGroup, open_sinks
from megamoe.training.step import TrainStep, build_train_step
from megamoe.training.weight_average import describe_change
from megamoe.utils.errors import Problems, UserError


def main() -> None:
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
        if words := words_of(error):
            print(words, file=sys.stderr)
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
        job = check(config, problems, device, is_first_on_host=rendezvous.rank_info.local_rank == 0)
        watch.collective_seconds = job.run.collective_timeout
        done = is_done(job) or run(job, rendezvous.store, position, stop)
        code = 0 if done else STOPPED
    except SystemExit as end:  # on all ranks
        code = int(end.code or 0)
    except BaseException as error:  # on this rank
        watch.fail(error)
    watch.close()
    end_groups()
    return code


def check(config: RunConfig | None, problems: Problems, device: torch.device, is_first_on_host: bool) -> Job:
    """The job that the command line asks for. Problems of any rank end all of them together. Collective.

    Args:
        config: None where the command line has `problems`.
    """
    job = None
    resumes = config and (config.resume or config.auto_resume)
    precision = find_precision(device, config.folder if config and resumes else None)
    if config:
        job = problems.attempt(
            Job, config, dist.get_world_size(), device, precision, dist.get_rank() == 0, is_first_on_host
        )
    raise_on_any_rank(problems)
    assert job
    return job


def is_done(job: Job) -> bool:
    """Whether a checkpoint of the last step, or a later one, is verified. Collective."""
    claims = [job.claims_to_be_done]
    dist.broadcast_object_list(claims)  # rank 0 decides
    if not claims[0]:
        return False
    problems: list[str] = []
    step = None
    try:
        newest = first_verified(job.candidates)
        step = folders.step_of(newest) if newest else None
        if newest in job.candidates:  # those before it need not be looked at again
            job.candidates = job.candidates[job.candidates.index(newest) :]
    except UserError as error:
        problems = error.problems
    if step is not None and step >= job.last_step and not job.run.auto_resume:
        ends = job.schedule.total_steps is not None
        longer = "total_num_steps in the DeepSpeed JSON, and --steps if it is given," if ends else "--steps"
        problems.append(
            f"{job.run_dir} is at step {step} already and the run ends at {job.last_step}; raise {longer} to train on."
        )
    raise_on_any_rank(problems)
    if step is None or step < job.last_step:
        return False
    if dist.get_rank() == 0:
        print(f"{job.run_dir} is at its last step, {step}, already", flush=True)
    return True


def run(job: Job, store: Store | None, position: Position, stop: StopRequest) -> bool:
    """Build, restore, train. Returns whether the last step was reached. Collective.

    Args:
        store: that all ranks share; None for a single rank.
        position: is told where this rank is.
        stop: asks for an end before the last step.
    """
    config = job.run
    peak = job.precision.mfu_peak(job.device, DTYPES[dtype_of(job.ds)])  # before the model takes the memory
    position.at("building the engine")
    with stop.interrupting():  # there is nothing to save, and a compiler may run for minutes
        train_step = build_train_step(
            job.model, job.ds, ep_size=config.ep_size, seed=config.seed, recompute_blocks=config.recompute_blocks,
            compiled=config.compile, ema_decay=config.ema_decay,
        )  # fmt: skip
    position.at("restoring")
    checkpoint = restore(job, train_step)
    first = (folders.step_of(checkpoint) or 0) if checkpoint else 0
    has_average = bool(train_step.average and train_step.average.has_begun)
    guard, ledger = restore_guard(job, checkpoint)
    sinks = enter(job, first, checkpoint, has_average) if dist.get_rank() == 0 else None
    writer = CheckpointWriter(
        train_step.engine,
        job.run_dir / "checkpoints",
        job.record(),
        store=store,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        background=not config.foreground_save,
        resumed=checkpoint,
        ledger=ledger,
        waiting=lambda: position.at("saving"),
    )
    trainer = Trainer(
        train_step, job.data, job.shape, writer, seed=config.seed, guard=guard, ledger=ledger, position=position,
        stop=stop, peak=peak,
        deadline=Deadline(config.time_limit, os.environ), evaluator=job.evaluator(), tasks=job.tasks(position),
        sinks=sinks,
        folder_is_gone=job.folder.is_gone if job.folder else lambda: False,
    )  # fmt: skip
    try:
        return trainer.run(
            first, job.last_step, log_every=config.log_interval, eval_every=config.eval_interval,
            save_every=config.save_interval, tasks_every=config.lm_eval_interval,
        )  # fmt: skip
    finally:
        if sinks:
            sinks.close()


def restore_guard(job: Job, checkpoint: Path | None) -> tuple[Guard, DataLedger]:
    """The run's guard as `checkpoint` has it, and its ledger. Collective."""
    config = job.run
    guard = Guard(
        GuardSettings(
            mode=config.guard,
            deviations=config.guard_deviations,
            window=config.guard_window,
            margin=config.guard_margin,
            skips=config.guard_skips,
            rollbacks=config.guard_rollbacks,
            warmup=job.schedule.warmup_steps,
        )
    )
    if checkpoint:
        guard.restore(saved_guard(checkpoint), folders.step_of(checkpoint) or 0)
    ledger = [job.ledger]
    dist.broadcast_object_list(ledger)  # rank 0 has read it
    return guard, ledger[0]


def enter(job: Job, first: int, checkpoint: Path | None, has_average: bool) -> SinkGroup:
    """Record the start or the resume in the run folder; returns the run's sinks, open. On rank 0.

    Args:
        has_average: the checkpoint holds averaged weights, and the run goes on with them.
    """
    job.enter_folder(first, checkpoint)
    sinks = open_sinks(job.run_dir, first)
    sinks.log_text(first, job.describe(first))
    if checkpoint:
        sinks.log_text(first, f"resumed from {checkpoint}")
    notes = (
        job.describe_precision(), job.describe_initial(), job.describe_products(), job.describe_split_dependence()
    )  # fmt: skip
    for line in filter(None, notes):
        sinks.log_text(first, line)
    if job.is_resuming and not checkpoint:
        sinks.log_text(0, f"{job.run_dir} holds no complete checkpoint, so the run begins again at step 0")
    if job.new_schedule:
        sinks.log_text(first, f"the schedule changes after step {first}: {json.dumps(job.new_schedule)}")
    if job.changes_ramp_at:
        sinks.log_text(first, f"the batch ramp changes with step {job.changes_ramp_at}")
    if job.reduces_in_fp32_now:
        sinks.log_text(first, f"gradients are reduced in fp32 after step {first} (communication_data_type)")
    change = describe_change(first, job.ema_decay_before, job.run.ema_decay, has_average) if checkpoint else None
    if change:
        sinks.log_text(first, change)
    return sinks


def restore(job: Job, train_step: TrainStep) -> Path | None:
    """Give the engine what the run starts from, if that is not drawn; returns the checkpoint that it resumes from.
    Problems of any rank end all of them together. Collective."""
    checkpoint, problems = None, []
    try:
        checkpoint = restore_first_verified(train_step.engine, job.candidates)
        if not checkpoint:
            restore_first_verified(train_step.engine, job.initial_weights, weights_only=True)
    except UserError as error:
        problems = error.problems
    raise_on_any_rank(problems)
    return checkpoint


if __name__ == "__main__":
    main()
