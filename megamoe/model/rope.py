"""Rotary position embeddings, with Hugging Face's forms of scaling.

Shape legend: B batch, T positions, d head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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
