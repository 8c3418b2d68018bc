"""The training loop: an ordered list of named steps, around what `build_train_step` has built."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import InitVar, dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from psutil import Process

from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.data.batches import TrainData
from megamoe.data.ledger import DataLedger
from megamoe.data.prefetch import Prefetcher
from megamoe.evaluation.held_out import Evaluator
from megamoe.evaluation.scoring import Share
from megamoe.evaluation.tasks import TaskEvaluator
from megamoe.launch.codes import FAILED, REFUSED
from megamoe.launch.distributed import on_any_rank
from megamoe.launch.stopping import Deadline, StopRequest
from megamoe.launch.watch import Position
from megamoe.monitoring.sinks import SinkGroup
from megamoe.training.balancing import Balance
from megamoe.training.guard import Guard, Return
from megamoe.training.metrics import StepMetrics
from megamoe.training.rollback import go_back
from megamoe.training.router_health import RouterHealth
from megamoe.training.samples import Sampler
from megamoe.training.skipped import SkippedSteps
from megamoe.training.step import StepResult, TrainStep
from megamoe.training.step_sums import Flags
from megamoe.utils.errors import UserError
from megamoe.utils.hardware import Peak


@dataclass(kw_only=True)
class Trainer:
    """Owns a run from its first step to its last."""

    train_step: TrainStep
    data: TrainData
    writer: CheckpointWriter
    seed: int  # of dropout and jitter
    guard: Guard
    ledger: DataLedger
    position: Position
    stop: StopRequest
    peak: InitVar[Peak]  # what MFU is the share of
    deadline: Deadline
    evaluator: Evaluator | None  # of held-out sets
    tasks: TaskEvaluator | None
    sampler: Sampler | None
    sinks: SinkGroup  # none but on rank 0
    collectives: AbstractContextManager[Any]  # entered for each step
    folder_is_gone: Callable[[], bool]  # whether the run folder has been removed; on rank 0, False elsewhere

    def __post_init__(self, peak: Peak) -> None:
        model, self.rank = self.train_step.model, dist.get_rank()
        self.health = RouterHealth(model.config)
        self.metrics = StepMetrics(self.train_step, self.data.phases, peak, self.data.source_names)
        self.skipped = SkippedSteps()
        # Multi-token prediction needs the token after the one that follows a sample's last position.
        ahead = model.config.num_nextn_predict_layers
        self.batches = Prefetcher(
            lambda data_step: self.data.step_batches(data_step, self.rank, ahead), self.train_step.device
        )
        self.position.follow(model.blocks())

    def run(
        self, first: int, last: int, *, log_every: int, eval_every: int, save_every: int, tasks_every: int = 0
    ) -> bool:
        """Train steps first + 1 to last; returns whether the last one was reached, not a request to stop. To be
        called once: the thread that reads data ends with it.

        Intervals are in steps; 0 means only after the last step. Exits with code 1 if the last step cannot be saved,
        and with 2 where training cannot go on: see `SkippedSteps`, and a run folder that is gone.
        """
        if any(on_any_rank(self.stop.asked, device=self.train_step.device)):
            self._tell("stop", first, "stopped by a signal before the first step", reason="by a signal")
            return False
        self.sinks.log_text(first, f"mfu is the share of {self.metrics.peak}")
        self.train_step.model.train()
        self.metrics.restart(first)
        longest = 0.0  # seconds from one step's end to the next
        with self.batches:
            step = first
            if why := self.guard.must_go_back():  # it was stopped in the very step that has shown it
                step = self._go_back(step, why)
            while step < last:
                step += 1
                started = time.perf_counter()
                logs, saves = step % log_every == 0, _due(step, save_every)
                # What stopping now would take, and as much again.
                needed = 2 * (longest + self.writer.expected_seconds())
                with self.collectives:
                    result = self._train(step, needed, looks_at_folder=logs or saves, weight_norms=logs)
                asked, out_of_time, writing, is_gone = result.flags
                # The update may still run on the device; the next step waits for it.
                self.metrics.add(result, self.ledger.data_step(step), time.perf_counter() - started)

                if step == first + 1:
                    self._tell("first_step", step, seconds=time.time() - Process().create_time())
                self._watch(step, last, result)
                leaves = asked or out_of_time
                final = step == last or leaves
                if logs or final:
                    self._log(step, last, result.balance)
                self._check(step, is_gone)
                why = self.guard.must_go_back()
                if why and not leaves:
                    step = self._go_back(step, why)
                    continue
                # Tasks and samples may take long: a run that leaves does not begin with them.
                self._look(step, step == last, eval_every, 0 if leaves else tasks_every, samples=not leaves)
                if self.writer.pending and not writing:
                    self.writer.complete()
                if saves or final:
                    self._save(step, final)
                if final and step < last:
                    how = "by a signal" if asked else "before the time limit"
                    self._tell("stop", step, f"stopped {how} after step {step}; continue with --resume", reason=how)
                    return False
                longest = max(longest, time.perf_counter() - started)
        self._tell("end", last)
        return True

    def _save(self, step: int, final: bool) -> None:
        """Begin to save, and if it is the `final` one, end it or exit."""
        self.writer.save(
            step, hold=final, skipped=self.skipped.take(), guard=self.guard.state(), good_until=self.guard.good_until
        )
        if final and not self.writer.complete():
            (is_gone,) = on_any_rank(self.folder_is_gone(), device=self.train_step.device)
            self._check(step, is_gone)
            self._tell("error", step, reason="the last checkpoint could not be saved", code=FAILED)
            sys.exit(FAILED)  # rank 0 has said why

    def _check(self, step: int, folder_is_gone: bool) -> None:
        """Warn, or end all ranks, where going on makes no sense."""
        warning = self.skipped.warning()
        error = None if self.guard.acts else self.skipped.error()  # it goes back first
        if folder_is_gone:
            error = f"{self.writer.folder.parent} has been removed while the run trained in it; start again"
        if warning:
            self._tell("warning", step, f"warning after step {step}: {warning}", reason=warning)
        if error:
            self._end(step, error)

    def _end(self, step: int, error: str) -> NoReturn:
        if self.writer.pending:
            self.writer.complete()
        if self.rank == 0:
            print(f"error: after step {step}: {error}.", file=sys.stderr, flush=True)
            self._tell("error", step, reason=error, code=REFUSED)
        sys.exit(REFUSED)

    def _watch(self, step: int, last: int, result: StepResult) -> None:
        """Count a step that was skipped, and have the guard look at it and at the routers."""
        scaler = self.train_step.engine.optimizer.loss_scaler
        lowers_scale = scaler.dynamic and scaler.cur_scale > scaler.min_scale and not result.is_spike
        self.skipped.count(was_applied=result.applied or result.is_spike or lowers_scale)
        event = self.guard.after(step, result, lowers_scale)
        if event:
            data_step = self.ledger.data_step(step)
            samples = self.data.step_samples(data_step)
            self._tell(event.kind, step, event.line, **event.values, data_step=data_step, samples=samples)
        if self.rank == 0 and self.guard.watches and result.balance:
            for line in self.health.warnings(step, last, result.balance):
                self._tell("warning", step, line, reason=line)

    def _go_back(self, step: int, why: Return) -> int:
        """Return to an older checkpoint; returns its step."""
        self.position.at("going back to a checkpoint")
        if self.writer.pending:
            self.writer.complete()
        try:
            self.ledger, event, line = go_back(why, step, writer=self.writer, guard=self.guard, ledger=self.ledger)
        except UserError as error:
            self._end(step, "; ".join(problem.rstrip(".") for problem in error.problems))
        to_step: int = event["to_step"]
        self.skipped = SkippedSteps()
        self.metrics.restart(to_step)
        self.sinks.go_back(to_step)
        self._tell("rollback", step, line, **event)
        return to_step

    def _train(self, step: int, needed: float, looks_at_folder: bool, weight_norms: bool) -> StepResult:
        """One optimizer step on this rank's micro-batches.

        Args:
            needed: seconds that stopping after it takes.
        """
        self.position.at("reading data", step)
        self._seed_step(step)
        batches = self.batches.step(self.ledger.data_step(step))
        self.train_step.accumulate(len(batches))
        self.train_step.forward_backward(batches)
        self.position.at("optimizer step")
        self.writer.before_update()
        return self.train_step.update(
            Flags(
                stop_asked=self.stop.asked,
                out_of_time=self.deadline.within(needed),
                writing=self.writer.writing,
                folder_is_gone=looks_at_folder and self.folder_is_gone(),
            ),
            self.guard.skips if self.guard.acts else None,
            weight_norms,
        )

    def _seed_step(self, step: int) -> None:
        """Dropout and jitter follow from (seed, rank, step): a resumed run draws what it would have drawn."""
        state = np.random.SeedSequence(self.seed, spawn_key=(self.rank, step)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def _log(self, step: int, last: int, balance: Balance | None) -> None:
        if self.rank == 0:
            values = {"guarded_steps": self.guard.guarded_steps, "rollbacks": self.ledger.rollbacks}
            before = self.metrics.peak
            self.sinks.log_scalars("train", step, {**self.metrics.values(step, last), **values})
            if self.metrics.peak != before:
                line = f"a step has reached {self.metrics.peak}; mfu is the share of that from here on"
                self.sinks.log_text(step, line)
            if balance:
                self.sinks.log_expert_loads(step, self.train_step.model.config.sparse_blocks, balance.counts)
        self.metrics.restart(step)

    def _look(self, step: int, is_last: bool, eval_every: int, tasks_every: int, samples: bool) -> None:
        """Evaluate and sample where that is due."""
        intervals = (self.evaluator, eval_every), (self.tasks, tasks_every)
        due = [one for one, every in intervals if one and (_due(step, every) or is_last)]
        if due:
            self._evaluate(due, step)
        if self.sampler and samples and (_due(step, self.sampler.every) or is_last):
            self._sample(self.sampler, step)

    def _evaluate(self, evaluators: Sequence[Evaluator | TaskEvaluator], step: int) -> None:
        self.position.at("evaluation")
        values, average = self._evaluated(evaluators), self.train_step.average
        if average and average.has_begun and self.evaluator and self.evaluator in evaluators:
            with average.in_model():
                averaged = self._evaluated([self.evaluator])
            values |= {f"ema_{name}": value for name, value in averaged.items() if name != "tokens"}
        self.train_step.model.train()
        if values:
            self.sinks.log_scalars("valid", step, values)

    def _sample(self, sampler: Sampler, step: int) -> None:
        self.position.at("sampling")
        samples = sampler.run(self.train_step.model, self._share(), self.train_step.device, step, self.position.at)
        self.train_step.model.train()
        self.sinks.log_samples(step, samples)

    def _evaluated(self, evaluators: Sequence[Evaluator | TaskEvaluator]) -> dict[str, Any]:
        """Evaluate the model with the weights that it has."""
        values: dict[str, Any] = {}
        for evaluator in evaluators:
            values |= evaluator.run(self.train_step.model, self._share(), self.train_step.device)
        return values

    def _share(self) -> Share:
        # Not that of a phase, whose samples may be shorter than held-out ones.
        return Share(self.train_step.engine.train_micro_batch_size_per_gpu(), self.rank, self.data.phases.world_size)

    def _tell(self, event: str, step: int, line: str | None = None, **values: Any) -> None:
        """Record an event, and say the line, if there is one."""
        if line:
            self.sinks.log_text(step, line)
        self.sinks.log_event(event, step, values)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
