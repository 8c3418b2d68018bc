"""Attention with latent tokens, rotary embeddings, the key/value cache, and one expert.

Shape legend: B batch, T query positions, S cached and new token positions, M latent tokens, D hidden_size,
H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]  # cos and sin, each (B or 1, T, d / 2)


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: dict[str, Any] | None,
    max_position_embeddings: int,
    lengths: Tensor,
) -> tuple[Tensor, float]:
    """Rotary frequencies (radians per position) and the factor on cos and sin, by Hugging Face's `rope_scaling`.

    Args:
        lengths: (B or 1,), sequence lengths; only "dynamic" looks at them.

    Returns frequencies of shape (B or 1, d / 2) in fp32, highest first.
    Source: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071), whose appendix has "linear" and "dynamic" (NTK); the
    "llama3" rule of the Llama 3.1 model card.
    """
    exponents = torch.arange(0, head_dim, 2, device=lengths.device, dtype=torch.float32) / head_dim
    frequencies = theta ** -exponents.unsqueeze(0)
    if scaling is None:
        return frequencies, 1.0
    kind, factor = scaling["rope_type"], scaling["factor"]
    original = scaling.get("original_max_position_embeddings", max_position_embeddings)
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "dynamic":
        stretch = factor * lengths.clamp_min(max_position_embeddings) / max_position_embeddings - (factor - 1)
        bases = theta * stretch.float().unsqueeze(1) ** (head_dim / (head_dim - 2))
        return bases**-exponents, 1.0
    if kind == "llama3":
        # Blend by wavelength: long waves are slowed by `factor`, short ones kept, a linear ramp between.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / factor), 1.0

    def dimension_of(rotations: float) -> float:  # the pair that turns so often within the original length
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension_of(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(dimension_of(scaling.get("beta_slow", 1))), head_dim - 1)
    pairs = torch.arange(head_dim // 2, device=lengths.device, dtype=torch.float32)
    slow = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return frequencies * (1 - slow + slow / factor), attention_factor


def rotary_table(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> Rotary:
    """cos and sin, each (B or 1, T, d / 2), for `positions` (B or 1, T); angles are computed in fp32."""
    angles = positions.float().unsqueeze(-1) * frequencies.unsqueeze(1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rotary(x: Tensor, rotary: Rotary, interleaved: bool) -> Tensor:
    """Rotate `x` (B, T, heads, d): pairs are (i, i + d/2), or (2i, 2i + 1) where `interleaved`."""
    cos, sin = (table.unsqueeze(2) for table in rotary)
    if interleaved:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


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


class LatentAttention(nn.Module):
    """Grouped-query causal attention over M learned latent positions followed by the tokens.

    The latents pass through this layer's key and value projections, are not rotated, and every token sees all of
    them. They send no queries: nothing would read the result.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        num_latent_tokens: int,
        rope_interleaved: bool = False,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.rope_interleaved = rope_interleaved
        self.latents = nn.Parameter(torch.empty(num_latent_tokens, hidden_size))
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend from `x` (B, T, D) to itself, the latents and what `cache` holds; returns (B, T, D).

        Args:
            rotary: cos and sin of the T positions.
            mask: (B, 1, T, M + S) from `attention_mask`; None means no padding and an empty cache.
        """
        batch, length, _ = x.shape
        query = apply_rotary(self._heads(self.q_proj(x)), rotary, self.rope_interleaved).transpose(1, 2)
        key = apply_rotary(self._heads(self.k_proj(x)), rotary, self.rope_interleaved).transpose(1, 2)
        value = self._heads(self.v_proj(x)).transpose(1, 2)
        if cache is None or cache.length == 0:
            key, value = self.with_latents(key, self.k_proj), self.with_latents(value, self.v_proj)
        if cache is not None:
            key, value = cache.append(key, value)
        if mask is not None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        else:
            # Plain causal attention over M + T positions gives every token all latents, and the fast kernels have it.
            # It wants as many queries as keys: the latents' share is filled with zeros and cut off again.
            num_latents = self.latents.shape[0]
            query = F.pad(query, (0, 0, num_latents, 0))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[:, :, num_latents:]
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (..., T, heads, d)

    def with_latents(self, x: Tensor, projection: nn.Linear) -> Tensor:
        """Put this layer's latents, as `projection` (of keys or values) maps them, ahead of `x` (B, G, S, d)."""
        latents = self._heads(projection(self.latents)).transpose(0, 1)  # (G, M, d)
        return torch.cat((latents.expand(x.shape[0], -1, -1, -1), x), dim=2)


class Dropout(nn.Dropout):
    """torch's dropout, on CPU with a mask that is cheaper to draw.

    There torch draws one number for every element, on one thread: a quarter of an expert's forward pass. Sixteen
    bits of a draw are enough for each: they meet the probability to 1/131,072.
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

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float = 0.0):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) -> (rows, D)."""
        return self.dropout(self.down_proj(F.silu(self.up_proj(x))))
