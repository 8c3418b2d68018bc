"""Loss-free balancing: the selection bias of every router moves toward the experts that got too little.

No auxiliary loss pulls on the weights. Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts" (arXiv:2408.15664).

Shape legend: E experts, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.model.router import Router


def max_violation(loads: Tensor) -> Tensor:
    """MaxVio, (max load - mean load) / mean load, over the last dimension. 0 is perfect balance, E - 1 the worst."""
    loads = loads.float()
    mean = loads.mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return loads.amax(-1) / mean - 1


@dataclass(frozen=True)
class Balance:
    """What one optimizer step saw. `counts` (L, E): slots per layer and expert over all ranks and micro-batches."""

    counts: Tensor
    batch_max_vio: Tensor  # (L,), of the counts
    running_max_vio: Tensor  # (L,), of the running loads


class LoadBalancer:
    """Moves the selection bias of every router after a step, identically on every rank."""

    def __init__(self, routers: list[Router], rate: float, rule: Literal["sign", "proportional"], decay: float):
        """
        Args:
            rate: change of a bias in one step ("sign"), or that at a load that is off by the mean ("proportional"),
                before the mean of all changes is subtracted: with "sign" a bias moves by less than 2 * rate; in units
                of the score.
            decay: of the running mean of the loads, per step.
        """
        self.routers = routers
        self.rate = rate
        self.rule = rule
        self.decay = decay

    @torch.no_grad()
    def step(self, applied: bool) -> Balance | None:
        """Close an optimizer step. Collective: every rank calls it, with the same `applied`.

        A skipped step moves nothing and forgets its counts; None comes back.
        """
        counts = torch.stack([router.step_counts for router in self.routers])
        for router in self.routers:
            router.step_counts.zero_()
        if not applied:
            return None
        if dist.is_initialized():
            dist.all_reduce(counts)  # one for all layers, over the whole data-parallel world
        loads = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        running = torch.stack([router.running_load for router in self.routers])
        running = self.decay * running + (1 - self.decay) * loads
        delta = self.rate * self._direction(running)
        delta -= delta.mean(-1, keepdim=True)
        for router, new_load, change in zip(self.routers, running, delta, strict=True):
            router.running_load.copy_(new_load)
            router.selection_bias += change
        return Balance(counts, max_violation(counts), max_violation(running))

    def _direction(self, running: Tensor) -> Tensor:
        shortage = 1 - running * running.shape[-1]  # (mean - load) / mean
        return shortage.sign() if self.rule == "sign" else shortage
