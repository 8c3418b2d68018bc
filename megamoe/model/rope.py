"""Rotary position embeddings, with Hugging Face's forms of scaling.

Shape legend: B batch, T positions, S those and the unrotated ones before them, d head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Rotary = tuple[Tensor, Tensor]  # cos, and sin with the sign of its place in a pair, each (B or 1, S, 1, d)


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


def rotary_table(
    positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype, interleaved: bool, num_unrotated: int = 0
) -> Rotary:
    """The table for `positions` (B or 1, T), and before them `num_unrotated` that are not rotated; angles are computed
    in fp32."""
    angles = positions.float().unsqueeze(-1) * frequencies.unsqueeze(1)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    pairs = (cos, cos), (-sin, sin)  # what multiplies each member of a pair, and what multiplies the other
    cos, sin = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1) for pair in pairs)
    cos, sin = F.pad(cos, (0, 0, num_unrotated, 0), value=1.0), F.pad(sin, (0, 0, num_unrotated, 0))
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def apply_rotary(x: Tensor, rotary: Rotary, interleaved: bool) -> Tensor:
    """Rotate `x` (B, S, heads, d): pairs are (i, i + d/2), or (2i, 2i + 1) where `interleaved`."""
    return _Rotate.apply(x, *rotary, interleaved)


class _Rotate(torch.autograd.Function):
    """Backward rotates the other way; nothing is kept for it but the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return (x * cos).addcmul_(_others(x, interleaved), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(_others(grad, ctx.interleaved), sin, value=-1), None, None, None


def _others(x: Tensor, interleaved: bool) -> Tensor:
    """In the place of each number, the other one of its pair."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)
