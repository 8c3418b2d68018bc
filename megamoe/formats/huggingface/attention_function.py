"""Transformers' caches and attention functions, in the form that megamoe's attention takes.

Shape legend: B batch, T positions of this call, S positions so far, M latent tokens, H heads, G key/value heads,
d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_megamoe import MegaMoeConfig


class TokenCache:
    """One layer of a transformers cache, which holds tokens only: the latents come with every call."""

    length = 0  # what attention asks before it puts the latents first

    def __init__(self, cache: Cache, layer: int, num_latents: int):
        self.cache = cache
        self.layer = layer
        self.num_latents = num_latents

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and new tokens (B, G, M + T, d) to latents and all tokens (B, G, M + S, d)."""
        sizes = [self.num_latents, key.shape[2] - self.num_latents]
        (latent_key, key), (latent_value, value) = key.split(sizes, dim=2), value.split(sizes, dim=2)
        key, value = self.cache.update(key, value, self.layer)
        if not self.num_latents:
            return key, value
        return torch.cat((latent_key, key), dim=2), torch.cat((latent_value, value), dim=2)


class AttentionWeights(nn.Identity):
    """Where transformers records the weights (B, H, T, M + S)."""


class AttentionFunction(nn.Module):
    """The one that `attn_implementation` names, in the place of `attend` in attention.py."""

    is_causal = True

    def __init__(self, config: MegaMoeConfig):
        super().__init__()
        self.config = config
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.weights = AttentionWeights()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        out, weights = function(self, query, key, value, mask, scaling=scaling)
        if weights is not None:
            self.weights(weights)
        return out.flatten(2)
