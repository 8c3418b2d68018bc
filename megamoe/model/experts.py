"""One expert, and the dropout on its output.

Shape legend: D hidden_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """torch's dropout, on CPU with a mask that is cheaper to draw.

    There torch draws one number for every element, on one thread: a quarter of an expert's forward pass. Sixteen
    bits of a draw are enough for each: the probability is exact to 1/131,072.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)  # evenly over all of int16
        threshold = min(round(self.p * 2**16) - 2**15, 2**15 - 1)
        return x * (numbers >= threshold).to(x.dtype).div_(1 - self.p)


class Expert(nn.Module):
    """Two projections with SiLU between, no gate, no biases, dropout on the output."""

    def __init__(self, *, hidden_size: int, intermediate_size: int, expert_dropout: float = 0.0):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.dropout = Dropout(expert_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) -> (rows, D)."""
        return self.dropout(self.down_proj(F.silu(self.up_proj(x))))
