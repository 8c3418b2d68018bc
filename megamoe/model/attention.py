"""Grouped-query attention over learned latent (prefix) tokens and the sequence, and its key/value cache.

Shape legend: B batch, T query positions, S cached and new token positions, M latent tokens, D hidden_size,
H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import Rotary, apply_rotary  # relative: an exported model has these files in one folder


def attention_mask(token_mask: Tensor, num_queries: int, num_latents: int) -> Tensor:
    """What each query may see: all latents, and the real tokens up to itself.

    Args:
        token_mask: (B, S), True at real tokens; the queries are its last `num_queries` positions.

    Returns (B, 1, T, M + S) bool. A padded query also sees itself, so that no softmax is over nothing.
    """
    length = token_mask.shape[1]
    keys = torch.arange(length, device=token_mask.device)
    queries = keys[length - num_queries :].unsqueeze(1)
    visible = ((keys <= queries) & token_mask.unsqueeze(1)) | (keys == queries)
    return F.pad(visible, (num_latents, 0), value=True).unsqueeze(1)


class LayerCache:
    """Keys and values of one layer, latents first, in memory for `capacity` positions allocated at the first append."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # positions held
        self._store: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, G, new, d) keys and values; return all of them, (B, G, length, d) each."""
        batch, heads, new, dim = key.shape
        if self._store is None:
            self._store = key.new_empty(2, batch, heads, self.capacity, dim)
        end = self.length + new
        self._store[0, :, :, self.length : end] = key
        self._store[1, :, :, self.length : end] = value
        self.length = end
        return self._store[0, :, :, :end], self._store[1, :, :, :end]


class PrefixLatentAttention(nn.Module):
    """Grouped-query causal attention over a prefix of M learned latent positions followed by the tokens.

    The latents pass through this layer's projections, are not rotated, and every token sees all of them. What their
    own queries find is cut off.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        num_latent_tokens: int,
        rope_interleaved: bool = False,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.rope_interleaved = rope_interleaved
        self.latents = nn.Parameter(torch.empty(num_latent_tokens, hidden_size))
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend from `x` (B, T, D) to itself, the latents and what `cache` holds; returns (B, T, D).

        Args:
            rotary: of the T positions; before them M that are not rotated, where `cache` does not hold the latents yet.
            mask: (B, 1, T, M + S) from `attention_mask`; None means no padding and an empty cache.
        """
        batch, length, _ = x.shape
        if len(self.latents) and (cache is None or cache.length == 0):
            x = torch.cat((self.latents.expand(batch, -1, -1), x), dim=1)
        query = apply_rotary(self._heads(self.q_proj(x)), rotary, self.rope_interleaved).transpose(1, 2)
        key = apply_rotary(self._heads(self.k_proj(x)), rotary, self.rope_interleaved).transpose(1, 2)
        value = self._heads(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        if query.is_cuda and (mask is not None or query.dtype == torch.float32):
            # No fused kernel has groups together with a mask, or in fp32: each query head gets keys of its own.
            key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
        if mask is not None:
            out = F.scaled_dot_product_attention(query[:, :, -length:], key, value, attn_mask=mask, enable_gqa=True)
        else:
            # Plain causal attention over M + T positions gives every token all latents, and the fast kernels have it.
            # It wants as many queries as keys, so the latents send some too, whose results are cut off.
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))[:, -length:]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (..., T, heads, d)
