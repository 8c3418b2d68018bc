"""What a training step reports: losses averaged over a window of steps, speed, balance, memory."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Any

from megamoe.config.phases import Phase, Phases
from megamoe.model.costs import train_flops_per_token
from megamoe.training.step import StepResult, TrainStep
from megamoe.utils.hardware import Peak, memory_gib


class StepMetrics:
    """Collects the steps since the last log line."""

    def __init__(self, train_step: TrainStep, phases: Phases, peak: Peak):
        """
        Args:
            peak: what MFU is the share of; one that was measured, next to other work perhaps, rises to the rate of a
                faster step.
        """
        self._engine = train_step.engine
        self._device = train_step.device
        self._config = train_step.model.config
        self._phases = phases
        self._blocks = train_step.model.config.sparse_blocks
        self.peak = peak
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin a new window after `step`."""
        self._first = step
        self._tokens = 0
        self._flops = self._seconds = self._losses = 0.0
        self._parts: dict[str, float] = {}

    def add(self, result: StepResult, phase: Phase, seconds: float) -> None:
        """Count one step, which has read data of that phase, and its time."""
        self._last, self._phase = result, phase
        tokens = phase.samples * phase.seq_len
        self._tokens += tokens
        self._flops += tokens * train_flops_per_token(self._config, phase.seq_len)
        self._losses += result.loss
        self._parts = {name: self._parts.get(name, 0.0) + value for name, value in result.parts.items()}
        self._seconds += seconds

    def values(self, step: int, last: int) -> dict[str, Any]:
        """The window's means up to `step`, and the state after it, by name; the parts of the loss, but for the
        cross-entropy, as NAME_loss.

        Args:
            last: step that the run ends with.
        """
        steps = step - self._first
        rate = self._tokens / self._seconds  # tokens per second
        flops = self._flops / self._seconds / self._phases.world_size
        if self.peak.is_measured:
            self.peak = replace(self.peak, flops=max(self.peak.flops, flops))
        phase, balance = self._phase, self._last.balance
        entropies, max_vio = (balance.entropies, balance.running_max_vio.tolist()) if balance else ([], [])
        return {
            "loss": self._losses / steps,
            **{f"{name}_loss": total / steps for name, total in self._parts.items()},
            "lr": self._engine.get_lr()[0],
            **({"batch_size": phase.samples, "seq_len": phase.seq_len} if len(self._phases.all) > 1 else {}),
            "tokens_per_second": rate,
            "mfu": flops / self.peak.flops,
            "max_vio": balance.batch_max_vio.mean().item() if balance else math.nan,
            "running_max_vio": balance.running_max_vio.mean().item() if balance else math.nan,
            "worst_running_max_vio": balance.running_max_vio.max().item() if balance else math.nan,
            "router_entropy": fmean(entropies) if entropies else math.nan,
            "lowest_router_entropy": min(entropies, default=math.nan),
            "router_entropy_by_block": dict(zip(map(str, self._blocks if entropies else []), entropies, strict=True)),
            "running_max_vio_by_block": dict(zip(map(str, self._blocks if balance else []), max_vio, strict=True)),
            "grad_norm": self._last.grad_norm,
            "memory_gib": memory_gib(self._device),
            "skipped_steps": self._engine.skipped_steps,
            "seconds_left": (self._phases.tokens_before(last + 1) - self._phases.tokens_before(step + 1)) / rate,
        }
