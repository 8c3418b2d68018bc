"""Pretrain a model: `deepspeed --num_gpus 8 megamoe/pretrain.py --ds_config ds_configs/zero2.json`.

Join the other ranks, check everything at once, build, restore, train, close. `--help` lists the options; each is a
field of RunConfig.
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from megamoe import cli
from megamoe.checkpoint import manifest
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config import parse_run
from megamoe.errors import UserError
from megamoe.job import Job
from megamoe.launch.exits import STOPPED, leave
from megamoe.launch.stopping import Deadline, StopRequest
from megamoe.launch.watch import Position, Watch
from megamoe.training.distributed import init_distributed, raise_on_any_rank
from megamoe.training.loop import Trainer
from megamoe.training.sinks import open_sinks
from megamoe.training.step import TrainStep, build_train_step


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        with contextlib.suppress(SystemExit):
            parse_run()
        sys.stdout.flush()
        leave(0)
    # The reader of our lines, a launcher or an ssh connection, may exit while the ranks still have to save.
    sys.stdout, sys.stderr = cli.Console(sys.stdout), cli.Console(sys.stderr)
    rendezvous, device = init_distributed()
    stop = StopRequest()  # until here a signal ends the process at once
    position = Position()
    watch = Watch(rendezvous, position)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)  # a rank that ends without it can abort at exit
        stack.callback(watch.close)
        try:
            job = check(device)
            watch.collective_seconds = job.run.collective_timeout
            code = 0 if job.is_done or run(job, position, stop) else STOPPED
        except SystemExit as end:  # on all ranks
            code = int(end.code or 0)
        except Exception as error:  # on this rank
            watch.fail(error)
    # Everything is written and closed. Without this, threads that libraries have left behind now and then abort the
    # process while it is taken down ("terminate called without an active exception"), and ranks would be slow enough to
    # be ended by a launcher that has seen the first one exit.
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)


def check(device: torch.device) -> Job:
    """The job that the command line asks for. Problems of any rank end all of them together. Collective."""
    job, problems = None, []
    try:
        job = Job(parse_run(), dist.get_world_size(), device)
    except UserError as error:
        problems = error.problems
    raise_on_any_rank(problems)
    assert job
    if job.is_done and dist.get_rank() == 0:
        print(f"{job.run_dir} is at its last step, {job.last_step}, already", flush=True)
    return job


def run(job: Job, position: Position, stop: StopRequest) -> bool:
    """Build, restore, train. Returns whether the last step was reached. Collective.

    Args:
        position: is told where this rank is.
        stop: asks for an end before the last step.
    """
    config = job.run
    position.at("building the engine")
    with stop.interrupting():  # there is nothing to save, and a compiler may run for minutes
        train_step = build_train_step(
            job.model, job.ds, ep_size=config.ep_size, seed=config.seed, recompute_blocks=config.recompute_blocks
        )
    position.at("restoring")
    first = restore(job, train_step)
    writer = CheckpointWriter(
        train_step.engine,
        job.run_dir / "checkpoints",
        job.record(),
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        background=not config.foreground_save,
        first=first,
        waiting=lambda: position.at("saving"),
    )
    sinks = None
    if dist.get_rank() == 0:
        job.create_folder()
        sinks = open_sinks(job.run_dir, first)
        sinks.log_text(first, job.describe(first))
    trainer = Trainer(
        train_step, job.data, job.shape, writer, seed=config.seed, position=position, stop=stop,
        deadline=Deadline(config.time_limit, os.environ), evaluator=job.evaluator(), sinks=sinks,
    )  # fmt: skip
    try:
        return trainer.run(
            first, job.last_step, log_every=config.log_interval, eval_every=config.eval_interval,
            save_every=config.save_interval,
        )  # fmt: skip
    finally:
        writer.close()
        if sinks:
            sinks.close()


def restore(job: Job, train_step: TrainStep) -> int:
    """Give the engine what the run starts from, if that is not drawn; returns the steps that are done. Problems of any
    rank end all of them together. Collective."""
    checkpoint, problems = None, []
    try:
        checkpoint = restore_first_verified(train_step.engine, job.candidates)
        if not checkpoint:
            restore_first_verified(train_step.engine, job.initial_weights, weights_only=True)
    except UserError as error:
        problems = error.problems
    raise_on_any_rank(problems)
    return manifest.step_of(checkpoint) if checkpoint else 0


if __name__ == "__main__":
    cli.run(main)
