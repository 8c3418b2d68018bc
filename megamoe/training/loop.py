"""The training loop, evaluation and stopping, around an engine that is already built."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.data.batches import BatchShape, TrainData
from megamoe.hardware import memory_gib, peak_flops
from megamoe.launch.stopping import Deadline, StopRequest
from megamoe.launch.watch import Position
from megamoe.model.costs import train_flops_per_token
from megamoe.training.balancing import Balance, LoadBalancer
from megamoe.training.distributed import on_any_rank
from megamoe.training.evaluation import Evaluator
from megamoe.training.sinks import Sinks


class Trainer:
    """Owns a run from its first step to its last."""

    def __init__(
        self,
        engine: Any,
        balancer: LoadBalancer,
        data: TrainData,
        evaluator: Evaluator | None,
        sinks: Sinks | None,
        shape: BatchShape,
        writer: CheckpointWriter,
        position: Position,
        stop: StopRequest,
        deadline: Deadline,
        *,
        seed: int,
    ):
        """
        Args:
            engine: of `build_engine`.
            evaluator: None trains without evaluation.
            sinks: on rank 0 only.
            writer: saves the engine.
            position: learns where this rank is.
            stop: the run saves and leaves when it is asked to.
            deadline: and ahead of this.
        """
        self.engine = engine
        self.model = engine.module
        self.balancer = balancer
        self.data = data
        self.evaluator = evaluator
        self.sinks = sinks
        self.shape = shape
        self.writer = writer
        self.position = position
        self.deadline = deadline
        self.seed = seed
        self.rank = dist.get_rank()
        self.device = engine.device
        self.stop = stop
        position.follow(self.model.layers)
        weight = next(self.model.parameters())
        self.step_flops = train_flops_per_token(self.model.config, shape.seq_len) * shape.samples * shape.seq_len
        self.peak_flops = peak_flops(self.device, weight.dtype) * shape.world_size

    def run(self, first: int, last: int, log_every: int, eval_every: int, save_every: int) -> bool:
        """Train steps first + 1 to last; returns whether the last one was reached, or the run was asked to stop before.

        Intervals are in steps; 0 means only after the last step. Exits with code 2 if the last step cannot be saved.
        """
        if any(on_any_rank(self.stop.asked, device=self.device)):
            self._say("stopped by a signal before the first step")
            return False
        self.model.train()
        self._start_window(first)
        longest = 0.0  # seconds from one step's end to the next
        for step in range(first + 1, last + 1):
            started = time.perf_counter()
            self.position.at("reading data", step)
            self._seed_step(step)
            self._losses += self._forward_backward(step)
            self.position.at("optimizer step")
            balance = self._optimizer_step()
            # What stopping now would take, and as much again.
            needed = 2 * (longest + self.writer.expected_seconds())
            # This waits for the device, so the clock has the whole step.
            flags = (self.stop.asked, self.deadline.within(needed), self.writer.writing)
            asked, out_of_time, writing = on_any_rank(*flags, device=self.device)
            self._seconds += time.perf_counter() - started

            final = step == last or asked or out_of_time
            if step % log_every == 0 or final:
                self._log(step, last, balance)
            if self.evaluator and (_due(step, eval_every) or step == last):
                self._evaluate(step)
            if self.writer.pending and not writing:
                self.writer.complete()
            if _due(step, save_every) or final:
                self.writer.save(step, hold=final)
            if final and not self.writer.complete():
                sys.exit(2)  # rank 0 has said why
            if final and step < last:
                why = "by a signal" if asked else "ahead of the time limit"
                self._say(f"stopped {why} after step {step}; go on with --resume")
                return False
            longest = max(longest, time.perf_counter() - started)
        return True

    def _seed_step(self, step: int) -> None:
        """Dropout and jitter follow from (seed, rank, step): a resumed run draws what it would have drawn."""
        state = np.random.SeedSequence(self.seed, spawn_key=(self.rank, step)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def _forward_backward(self, step: int) -> Tensor:
        """Run this rank's micro-batches; returns the mean of their losses."""
        shape = self.shape
        total = torch.zeros((), device=self.device)
        for micro in range(shape.accumulation):
            group = ((step - 1) * shape.accumulation + micro) * shape.world_size + self.rank
            batch = self.data.batch(group * shape.micro_batch, shape.micro_batch)
            input_ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            loss = self.engine(input_ids, labels)
            self.engine.backward(loss)
            if micro < shape.accumulation - 1:
                self.engine.step()  # DeepSpeed counts micro-batches by this call; nothing is applied yet
            total += loss.detach()
        return total / shape.accumulation

    def _optimizer_step(self) -> Balance | None:
        self.writer.before_update()
        self.engine.step()
        return self.balancer.step(self.engine.was_step_applied())

    def _start_window(self, step: int) -> None:
        """Begin to average for the next console line."""
        self._window_start = step
        self._seconds = 0.0
        self._losses = torch.zeros((), device=self.device)

    def _log(self, step: int, last: int, balance: Balance | None) -> None:
        steps = step - self._window_start
        dist.all_reduce(self._losses)
        rate = steps / self._seconds  # steps per second
        if self.sinks:
            record = {
                "step": step,
                "loss": self._losses.item() / self.shape.world_size / steps,
                "lr": self.engine.get_lr()[0],
                "tokens_per_second": rate * self.shape.samples * self.shape.seq_len,
                "mfu": rate * self.step_flops / self.peak_flops,
                "max_vio": balance.batch_max_vio.mean().item() if balance else math.nan,
                "running_max_vio": balance.running_max_vio.mean().item() if balance else math.nan,
                "worst_running_max_vio": balance.running_max_vio.max().item() if balance else math.nan,
                "grad_norm": float(self.engine.get_global_grad_norm()),
                "memory_gib": memory_gib(self.device),
                "skipped_steps": self.engine.skipped_steps,
            }
            self.sinks.step(record, seconds_left=(last - step) / rate)
            if balance:
                self.sinks.expert_loads(step, balance.counts)
        self._start_window(step)

    def _evaluate(self, step: int) -> None:
        assert self.evaluator
        self.position.at("evaluation")
        result = self.evaluator.run(self.model, self.shape.micro_batch, self.rank, self.shape.world_size, self.device)
        if self.sinks:
            self.sinks.evaluation({"step": step, **result})

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
