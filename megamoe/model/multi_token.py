"""Multi-token prediction, depth 1: a further block that predicts the token after the next one, for training.

Source: DeepSeek-V3 (arXiv:2412.19437, section 2.2).

Shape legend: B batch, T positions, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamoe.config.model import ModelConfig
from megamoe.model.block import Block
from megamoe.model.document_attention import Mask
from megamoe.model.rope import Rotary
from megamoe.model.topology import ExpertTopology


class MultiTokenPredictor(nn.Module):
    """Joins what the model has made of the tokens up to each position with the embedding of the token after it.

    Embedding and head are the model's.
    """

    def __init__(self, config: ModelConfig, topology: ExpertTopology):
        super().__init__()
        self.embed_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, topology, is_dense=False)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, rotary: Rotary, mask: Mask, used: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """States for the head (B, T, D), and the losses (2,) of the block's router, where it has any.

        Args:
            hidden: (B, T, D), behind the model's last norm, as servers feed the block of published DeepSeek weights;
                the paper leaves it open.
            embedded: (B, T, D), of the token that follows each position.
            rotary: of the positions, as the model's blocks take it; `mask` and `used` too.
        """
        x = self.proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), dim=-1))
        x, losses = self.block(x, rotary, mask, used, None)
        return self.norm(x), losses
