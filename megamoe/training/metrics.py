"""What a training step reports: losses averaged over a window of steps, speed, balance, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from megamoe.config.phases import Phases
from megamoe.model.costs import train_flops_per_token
from megamoe.training.balancing import effective_experts
from megamoe.training.router_health import DEAD_SHARE
from megamoe.training.step import StepResult, TrainStep
from megamoe.utils.hardware import Peak, memory_gib


class StepMetrics:
    """Collects the steps since the last log line."""

    def __init__(self, train_step: TrainStep, phases: Phases, peak: Peak, source_names: Sequence[str] = ()):
        """
        Args:
            peak: what MFU is the share of; one that was measured, next to other work perhaps, rises to the rate of a
                faster step.
            source_names: of the samples, by number, where their losses are kept apart.
        """
        self._engine = train_step.engine
        self._device = train_step.device
        self._config = train_step.model.config
        self._phases = phases
        self._blocks = train_step.model.config.sparse_blocks
        self.peak = peak
        self._source_names = source_names
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin a new window after `step`."""
        self._first = step
        self._tokens = 0
        self._flops = self._seconds = self._losses = 0.0
        self._parts: dict[str, float] = {}
        self._sources = torch.zeros(len(self._source_names), 2, dtype=torch.float64)
        self._counts = torch.zeros(len(self._blocks), self._config.num_local_experts, dtype=torch.float64)

    def add(self, result: StepResult, data_step: int, seconds: float) -> None:
        """Count one step, which has read the data of `data_step`, and its time."""
        phase = self._phases.at(data_step)
        self._last, self._phase, self._data_step = result, phase, data_step
        tokens = phase.samples * phase.seq_len
        self._tokens += tokens
        self._flops += tokens * train_flops_per_token(self._config, phase.seq_len)
        self._losses += result.loss
        self._parts = {name: self._parts.get(name, 0.0) + value for name, value in result.parts.items()}
        self._seconds += seconds
        if self._source_names:
            self._sources += torch.tensor(result.sources, dtype=torch.float64)
        if result.balance:
            self._counts += result.balance.counts

    def values(self, step: int, last: int) -> dict[str, Any]:
        """The window's means up to `step`, and the state after it, by name; the parts of the loss, but for the
        cross-entropy, as NAME_loss, the cross-entropy of a source of samples as loss/NAME.

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
        dead = math.nan
        if balance:
            dead = (balance.running_loads * balance.running_loads.shape[1] < DEAD_SHARE).sum().item()
        effective = effective_experts(self._counts)
        sources = zip(self._source_names, self._sources.tolist(), strict=True)
        read = list(zip(self._phases.all, self._phases.tokens_by_phase(self._data_step + 1), strict=True))
        return {
            "loss": self._losses / steps,
            **{f"{name}_loss": total / steps for name, total in self._parts.items()},
            **{f"loss/{name}": nats / tokens for name, (nats, tokens) in sources if tokens},
            "lr": self._engine.get_lr()[0],
            **({"batch_size": phase.samples, "seq_len": phase.seq_len} if len(self._phases.all) > 1 else {}),
            "total_tokens": sum(tokens for _, tokens in read),
            "total_flops": sum(tokens * train_flops_per_token(self._config, one.seq_len) for one, tokens in read),
            "tokens_per_second": rate,
            "mfu": flops / self.peak.flops,
            "max_vio": balance.batch_max_vio.mean().item() if balance else math.nan,
            "running_max_vio": balance.running_max_vio.mean().item() if balance else math.nan,
            "worst_running_max_vio": balance.running_max_vio.max().item() if balance else math.nan,
            "dead_experts": dead,
            "effective_experts": effective.mean().item(),
            "lowest_effective_experts": min(effective.tolist(), default=math.nan),
            "router_entropy": fmean(entropies) if entropies else math.nan,
            "lowest_router_entropy": min(entropies, default=math.nan),
            "router_entropy_by_block": dict(zip(map(str, self._blocks if entropies else []), entropies, strict=True)),
            "running_max_vio_by_block": dict(zip(map(str, self._blocks if balance else []), max_vio, strict=True)),
            "grad_norm": self._last.grad_norm,
            **{f"weight_norm/{kind}": norm for kind, norm in self._last.weight_norms.items()},
            "memory_gib": memory_gib(self._device),
            "skipped_steps": self._engine.skipped_steps,
            "seconds_left": (self._phases.tokens_before(last + 1) - self._phases.tokens_before(step + 1)) / rate,
        }
