"""The experts of one layer that one rank holds, stacked: one parameter and one grouped GEMM for each projection.

Shape legend: E experts of this rank, D hidden_size, F expert_size, P rows, grouped by expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megamoe.model.dropout import Dropout
from megamoe.model.feed_forward import ACTIVATIONS, Activation
from megamoe.model.grouped_gemm import grouped_linear


class StackedExperts(nn.Module):
    """Two projections with an activation between, no biases, dropout on the output; gated, as in SwiGLU, or not.

    Parameters:
        gate_up: (E, 2F, D), of gated experts: the gate's rows, then those of the projection that it gates.
        up: (E, F, D), of experts without a gate.
        down: (E, D, F).

    Source of the gate: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202).
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        expert_size: int,
        hidden_act: Activation = "silu",
        gated_mlp: bool = False,
        expert_dropout: float = 0.0,
    ):
        super().__init__()
        self.activation = ACTIVATIONS[hidden_act]
        self.gated = gated_mlp
        if gated_mlp:
            self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        else:
            self.up = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.dropout = Dropout(expert_dropout)

    def forward(self, rows: Tensor, ends: Tensor, activate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(P, D) -> (P, D).

        Args:
            ends: (E,) int32, where each expert's rows end; the last is P.
            activate: what runs instead of the method of this name.
        """
        weight = self.gate_up if self.gated else self.up
        inside = (activate or self.activate)(grouped_linear(rows, weight, ends))
        return self.dropout(grouped_linear(inside, self.down, ends))

    def activate(self, projected: Tensor) -> Tensor:
        """What lies between the two GEMMs: (P, F), or (P, 2F) of gated experts, -> (P, F)."""
        if not self.gated:
            return self.activation(projected)
        gate, up = projected.chunk(2, dim=-1)
        return self.activation(gate) * up
