"""Pretrain a model: `deepspeed --num_gpus 8 megamoe/pretrain.py --ds_config ds_configs/zero2.json`.

Parse, check everything at once, build, train, close. `--help` lists the options; each is a field of RunConfig.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamoe import cli
from megamoe.checkpoint import manifest
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.ds_config import dtype_of
from megamoe.errors import UserError
from megamoe.job import Job, parse_run
from megamoe.launch.stopping import STOPPED, Deadline, StopRequest
from megamoe.launch.watch import Position, Watch
from megamoe.model.costs import parameter_count
from megamoe.model.decoder import Decoder
from megamoe.training.balancing import LoadBalancer
from megamoe.training.distributed import agree, init_distributed
from megamoe.training.engine import build_engine
from megamoe.training.loop import Trainer


def prepare(rank: int, world_size: int, device: torch.device) -> Job:
    """Parse and check; problems of any rank end all of them together."""
    job, problems = None, []
    try:
        job = Job(parse_run(), world_size, device)
    except UserError as error:
        problems = error.problems
    agree(problems, rank)
    assert job
    return job


def restore(job: Job, engine: Any, first_expert: int) -> int:
    """Give the engine what the run starts from, if that is not drawn; returns the steps that are done. Collective."""
    checkpoint = restore_first_verified(engine, job.candidates, first_expert)
    if checkpoint:
        return manifest.step_of(checkpoint)
    restore_first_verified(engine, job.initial_weights, first_expert, weights_only=True)
    return 0


def train(job: Job, rank: int, position: Position, stop: StopRequest) -> bool:
    """Build the engine, restore a checkpoint where there is one, and train. Returns whether the last step was reached.

    Args:
        position: learns where this rank is.
        stop: asks for an end before the last step.
    """
    run, model_config = job.run, job.model
    position.at("building the engine")
    # DeepSpeed's expert-parallel groups are consecutive ranks.
    ep_rank = rank % run.ep_size
    model = Decoder(model_config, run.seed, run.ep_size, ep_rank, run.recompute_blocks)
    engine = build_engine(model, job.ds, job.schedule)
    position.at("restoring")
    first, problems = 0, []
    try:
        first = restore(job, engine, ep_rank * (model_config.num_local_experts // run.ep_size))
    except UserError as error:
        problems = error.problems
    agree(problems, rank)
    sinks = job.open_folder(first) if rank == 0 else None
    if rank == 0:
        shape = job.shape
        print(
            f"{run.preset}: {parameter_count(model_config):,} parameters, {dtype_of(job.ds)}, "
            f"{shape.world_size} ranks, ep_size {run.ep_size}; {shape.samples} x {shape.seq_len} tokens a step; "
            f"{job.corpus_words()}; steps {first} to {job.last_step}; "
            f"run folder {job.run_dir}",
            flush=True,
        )
    balancer = LoadBalancer(
        model.routers(), model_config.router_bias_rate, model_config.router_bias_rule, model_config.router_load_decay
    )
    writer = CheckpointWriter(
        engine,
        job.run_dir / "checkpoints",
        job.record(),
        keep_last=run.keep_last,
        keep_every=run.keep_every,
        background=not run.foreground_save,
        first=first,
        waiting=lambda: position.at("saving"),
    )
    deadline = Deadline(run.time_limit, os.environ)
    trainer = Trainer(
        engine, balancer, job.data, job.evaluator(), sinks, job.shape, writer, position, stop, deadline, seed=run.seed
    )
    try:
        return trainer.run(first, job.last_step, run.log_interval, run.eval_interval, run.save_interval)
    finally:
        writer.close()
        if sinks:
            sinks.close()


def stopped_code() -> int:
    """Exit code of a run that leaves early. torchrun would take any but 0 for a failure, and start the ranks again; its
    launch script gives a file for a note, and then ends with `STOPPED` itself."""
    note = os.environ.get("MEGAMOE_STOP_NOTE")
    if note is None:
        return STOPPED
    Path(note).touch()
    return 0


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        parse_run()
    # The reader of our lines, a launcher or an ssh connection, may go while the ranks still have to save.
    sys.stdout, sys.stderr = cli.Console(sys.stdout), cli.Console(sys.stderr)
    meeting, device = init_distributed()
    stop = StopRequest()  # until here a signal ends the process at once
    position = Position()
    watch = Watch(meeting, position)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)  # a rank that ends without it can abort at exit
        stack.callback(watch.close)
        try:
            job = prepare(meeting.seat.rank, meeting.seat.world_size, device)
            watch.collective_seconds = job.run.collective_timeout
            finished = job.is_done or train(job, meeting.seat.rank, position, stop)
            if job.is_done and meeting.seat.rank == 0:
                print(f"{job.run_dir} is at its last step, {job.last_step}, already", flush=True)
            code = 0 if finished else stopped_code()
        except SystemExit as end:  # on all ranks
            code = int(end.code or 0)
        except Exception as error:
            watch.explain(error)
            raise
    # Everything is written and closed. Without this, threads that libraries have left behind now and then abort the
    # process while it is taken down ("terminate called without an active exception"), and ranks would be slow enough to
    # be ended by a launcher that has seen the first one go.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    cli.run(main)
