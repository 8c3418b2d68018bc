"""What a training step reports: losses averaged over a window of steps, speed, balance, memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.data.batches import BatchShape
from megamoe.hardware import memory_gib, peak_flops
from megamoe.model.costs import train_flops_per_token
from megamoe.training.balancing import Balance
from megamoe.training.step import TrainStep


class StepMetrics:
    """Collects the steps since the last log line."""

    def __init__(self, train_step: TrainStep, shape: BatchShape):
        self._engine = train_step.engine
        self._device = train_step.device
        self._shape = shape
        weight = next(train_step.model.parameters())
        tokens = shape.samples * shape.seq_len
        self._step_flops = train_flops_per_token(train_step.model.config, shape.seq_len) * tokens
        self._peak_flops = peak_flops(self._device, weight.dtype) * shape.world_size
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin a new window after `step`."""
        self._first = step
        self._seconds = 0.0
        self._losses = torch.zeros((), device=self._device)

    def add_loss(self, loss: Tensor) -> None:
        """Count one step's loss of this rank."""
        self._losses += loss

    def add_seconds(self, seconds: float) -> None:
        """Count one step's time."""
        self._seconds += seconds

    def reduce(self) -> None:
        """Sum the losses over all ranks. Collective; call it before `values`."""
        dist.all_reduce(self._losses)

    def values(self, step: int, last: int, balance: Balance | None) -> dict[str, Any]:
        """The window's means up to `step`, and the state after it, by name.

        Args:
            last: step that the run ends with.
            balance: of `step`; None if it was skipped.
        """
        steps = step - self._first
        rate = steps / self._seconds  # steps per second
        return {
            "loss": self._losses.item() / self._shape.world_size / steps,
            "lr": self._engine.get_lr()[0],
            "tokens_per_second": rate * self._shape.samples * self._shape.seq_len,
            "mfu": rate * self._step_flops / self._peak_flops,
            "max_vio": balance.batch_max_vio.mean().item() if balance else math.nan,
            "running_max_vio": balance.running_max_vio.mean().item() if balance else math.nan,
            "worst_running_max_vio": balance.running_max_vio.max().item() if balance else math.nan,
            "grad_norm": float(self._engine.get_global_grad_norm()),
            "memory_gib": memory_gib(self._device),
            "skipped_steps": self._engine.skipped_steps,
            "seconds_left": (last - step) / rate,
        }
