"""Loss-free balancing: the selection bias of every router moves toward the experts that got too little.

No auxiliary loss pulls on the weights. Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts" (arXiv:2408.15664); for the rule "quantile", see `model/margins.py`.

Shape legend: E experts, L layers, N bins of margins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.config.model import BiasRule
from megamoe.model.margins import needed_shifts
from megamoe.model.router import Router


def max_violation(loads: Tensor) -> Tensor:
    """MaxVio, (max load - mean load) / mean load, over the last dimension. 0 is perfect balance, E - 1 the worst."""
    loads = loads.float()
    mean = loads.mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return loads.amax(-1) / mean - 1


def effective_experts(loads: Tensor) -> Tensor:
    """exp(entropy of the loads' shares), over the last dimension: E for equal loads, 1 if one expert has all."""
    return torch.special.entr(loads / loads.sum(-1, keepdim=True)).sum(-1).exp()


@dataclass(frozen=True)
class Balance:
    """What one optimizer step saw, on the host."""

    counts: Tensor  # (L, E) int64: slots per layer and expert over all ranks and micro-batches
    running_loads: Tensor  # (L, E) fp32: running means of the shares, this step included
    entropies: list[float]  # (L,), nats: of a router's scores, which sum to 1, the mean over all tokens

    @property
    def batch_max_vio(self) -> Tensor:
        """(L,), of the counts."""
        return max_violation(self.counts)

    @property
    def running_max_vio(self) -> Tensor:
        """(L,), of the running loads."""
        return max_violation(self.running_loads)


@dataclass
class LoadBalancer:
    """Moves running load and selection bias of every router after a step, identically on every rank, and never waits
    for the device.

    In a step: `take_counts` and `take_margins`, sum them over all ranks, `next_loads` of the sums, and `apply` these
    unless the step is skipped.
    """

    routers: list[Router]
    # Change of a bias in one step ("sign"), or that at a load that is off by the mean ("proportional"), before the mean
    # of all changes is subtracted, in units of the score. "quantile" does not read it.
    rate: float
    rule: BiasRule
    decay: float  # of the running mean of the loads, per step

    def take_counts(self) -> Tensor:
        """(L, E) int64: slots that this rank has routed since the last call."""
        counts = torch.stack([router.step_counts for router in self.routers])
        torch._foreach_zero_([router.step_counts for router in self.routers])
        return counts

    def take_margins(self) -> Tensor:
        """(L, N, E) int64: tokens of this rank in each bin of the margins since the last call; empty where the rule
        does not need them."""
        held = [router.step_margins for router in self.routers if router.step_margins is not None]
        if not held:
            return self.routers[0].step_counts.new_zeros(0)
        margins = torch.stack(held)
        torch._foreach_zero_(held)
        return margins

    def next_loads(self, counts: Tensor) -> Tensor:
        """(L, E) fp32: the running loads after a step with these counts (L, E) over all ranks."""
        loads = counts.float() / counts.sum(-1, keepdim=True).clamp_min(1).float()
        running = torch.stack([router.running_load for router in self.routers])
        return self.decay * running + (1 - self.decay) * loads

    @torch.no_grad()
    def apply(self, running: Tensor, margins: Tensor) -> None:
        """Take (L, E) `running` for the running loads, and move the biases of routers that have one, by these or, with
        "quantile", by the margins of the step over all ranks, (L, N, E)."""
        delta = self._shifts(running, margins)
        delta -= delta.mean(-1, keepdim=True)
        torch._foreach_copy_([router.running_load for router in self.routers], list(running))
        biases = [router.selection_bias for router in self.routers if router.selection_bias is not None]
        if biases:
            torch._foreach_add_(biases, list(delta))

    def _shifts(self, running: Tensor, margins: Tensor) -> Tensor:
        shortage = 1 - running * running.shape[-1]  # (mean - load) / mean
        if self.rule == "sign":
            return self.rate * shortage.sign()
        if self.rule == "proportional":
            return self.rate * shortage
        edges, share = self.routers[0].margin_edges, self.routers[0].top_k / running.shape[-1]
        if edges is None:  # nothing to choose, or a bias that stays
            return torch.zeros_like(running)
        return needed_shifts(margins, share, edges.double()).float()
