"""The MLP of a dense block, and that of the shared experts.

Shape legend: D hidden_size, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """Two projections with an activation between, no biases; gated, as in SwiGLU, or not.

    Source of the gate: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202).
    """

    def __init__(
        self, *, hidden_size: int, intermediate_size: int, hidden_act: Activation = "silu", gated_mlp: bool = False
    ):
        super().__init__()
        self.activation = ACTIVATIONS[hidden_act]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False) if gated_mlp else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        up = self.up_proj(x)
        return self.down_proj(self.activation(self.gate_proj(x)) * up if self.gate_proj else self.activation(up))
