"""Muon for the matrices of the blocks, AdamW for all else, on the flat partitions of DeepSpeed's ZeRO optimizer.

The momentum is in fp32 and split over the ranks as the masters are. A step takes a matrix as a whole, so one that the
end of a rank's share cuts is sent to the rank on which it begins, and its update comes back.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with its five Newton-Schulz
steps, Nesterov momentum and scale; the momentum is averaged as in torch.optim.Muon.

Shape legend: B matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from megamoe.training.matrix_share import MatrixShare

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, (x xT) x and (x xT)^2 x
NEWTON_SCHULZ_STEPS = 5
LEAST_NORM = 1e-15  # the 1e-7 of others would shrink the updates of experts that few tokens reach


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix with its singular values brought near 1, times sqrt(max(1, R / C)): (B, R, C) -> (B, R, C) of
    `dtype`, in which they are multiplied."""
    rows, columns = matrices.shape[1:]
    x = matrices.mT if rows > columns else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + LEAST_NORM)).to(dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x) * math.sqrt(max(1, rows / columns))


def orthogonalize_share(update: Tensor, share: MatrixShare, group: Any, dtype: torch.dtype) -> None:
    """Replace a rank's part of a flat group of matrices, (partition,), by that of the orthogonalized ones. Collective
    where any matrix of the group is cut.

    Args:
        group: the ranks that have the other parts.
    """
    if share.is_cut:
        _orthogonalize_cut(update, share, group, dtype)
    for run in share.whole:
        matrices = update[run.start - share.start : run.end - share.start].view(run.count, run.rows, run.columns)
        matrices.copy_(orthogonalize(matrices, dtype))


def _orthogonalize_cut(update: Tensor, share: MatrixShare, group: Any, dtype: torch.dtype) -> None:
    head = update[: sum(share.sent)]
    rest = update.new_empty(sum(share.received))
    dist.all_to_all_single(rest, head, share.received, share.sent, group=group)
    if share.tail:
        here = update[share.tail.start - share.start :]
        matrix = torch.cat((here, rest)).view(1, share.tail.rows, share.tail.columns)
        updated = orthogonalize(matrix, dtype).flatten()
        here.copy_(updated[: len(here)])
        rest.copy_(updated[len(here) :])
    dist.all_to_all_single(head, rest, share.sent, share.received, group=group)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon`, AdamW for the others; each parameter is a flat partition of its group.

    State: `momentum_buffer` with Muon; `exp_avg`, `exp_avg_sq` and `step` with AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        dtype: torch.dtype,
    ):
        """
        Args:
            lr: of the groups that have none of their own.
            dtype: of Muon's matrix multiplications.
        """
        settings = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**settings, "use_muon": False})
        self._dtype = dtype
        self._shares: dict[Tensor, tuple[MatrixShare, Any]] = {}

    def set_share(self, partition: Tensor, share: MatrixShare, group: Any) -> None:
        """Say which matrices a partition of a group with `use_muon` holds, and which ranks have the others; before the
        first step."""
        self._shares[partition] = share, group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients, which Muon's groups overwrite. Collective, the groups in one order on all ranks."""
        for group in self.param_groups:
            for partition in group["params"]:
                assert partition.grad is not None, "the step of a partition needs its gradient"
                (self._step_muon if group["use_muon"] else self._step_adamw)(partition, partition.grad, group)

    def _step_muon(self, partition: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[partition]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(partition)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp_(momentum, group["momentum"])
        orthogonalize_share(update, *self._shares[partition], self._dtype)
        partition.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _step_adamw(self, partition: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[partition]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(partition), torch.zeros_like(partition)
        state["step"] = state["step"].to(partition.device)  # restored, it is on the host, as a file gives it
        adamw(
            [partition],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
