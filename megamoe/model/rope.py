"""Rotary position embeddings, with Hugging Face's forms of scaling.

Shape legend: B batch, T positions, S those and the unrotated ones before them, d head_dim, r of its dimensions rotated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Rotary = tuple[Tensor, Tensor]  # cos, and sin with the sign of its place in a pair, each (B or 1, S, 1, r)


def rope_frequencies(
    rotary_dim: int,
    theta: float,
    scaling: dict[str, Any] | None,
    max_position_embeddings: int,
    lengths: Tensor,
) -> tuple[Tensor, float]:
    """Rotary frequencies (radians per position) and the factor on cos and sin, by Hugging Face's `rope_scaling`.

    Args:
        rotary_dim: r, how many dimensions of a head are rotated; an even number.
        lengths: (B or 1,) of sequences, or (B, T) of the document of each token; only "dynamic" looks at them.

    Returns frequencies of shape (B or 1, r / 2), or (B, T, r / 2), in fp32, highest first.
    Source: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071), whose appendix has "linear" and "dynamic" (NTK); the
    "llama3" rule of the Llama 3.1 model card.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=lengths.device, dtype=torch.float32) / rotary_dim
    frequencies = theta ** -exponents.unsqueeze(0)
    if scaling is None:
        return frequencies, 1.0
    kind, factor = scaling["rope_type"], scaling["factor"]
    original = scaling.get("original_max_position_embeddings", max_position_embeddings)
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "dynamic":
        stretch = factor * lengths.clamp_min(max_position_embeddings) / max_position_embeddings - (factor - 1)
        bases = theta * stretch.float().unsqueeze(-1) ** (rotary_dim / (rotary_dim - 2))
        return bases**-exponents, 1.0
    if kind == "llama3":
        # Blend by wavelength: long waves are slowed by `factor`, short ones kept, a linear ramp between.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / factor), 1.0

    def dimension_of(rotations: float) -> float:  # the pair that turns so often within the original length
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension_of(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(dimension_of(scaling.get("beta_slow", 1))), rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, device=lengths.device, dtype=torch.float32)
    slow = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - slow + slow / factor), yarn_attention_factor(scaling)


def yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """The factor on cos and sin: `attention_factor`, or by "mscale" and "mscale_all_dim", or by "factor" alone.

    Source: `_compute_yarn_parameters` of transformers' modeling_rope_utils.py.
    """
    if scaling.get("attention_factor"):
        return scaling["attention_factor"]
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_mscale(scaling["factor"], mscale) / _yarn_mscale(scaling["factor"], mscale_all_dim)
    return _yarn_mscale(scaling["factor"], 1.0)


def softmax_scale(head_dim: int, scaling: dict[str, Any] | None) -> float:
    """The factor on the scores of multi-head latent attention, whose yarn scales them whole by "mscale_all_dim".

    Args:
        head_dim: of queries and keys, with the dimensions that are not rotated.

    Source: `yarn_apply_mscale` of transformers' modeling_deepseek_v3.py.
    """
    scale = head_dim**-0.5
    if scaling is None or not scaling.get("mscale_all_dim"):
        return scale
    return scale * _yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _yarn_mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_table(
    positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype, interleaved: bool, num_unrotated: int = 0
) -> Rotary:
    """The table for `positions` (B or 1, T), and before them `num_unrotated` that are not rotated; angles are computed
    in fp32."""
    angles = positions.float().unsqueeze(-1) * (frequencies if frequencies.dim() == 3 else frequencies.unsqueeze(1))
    cos, sin = angles.cos() * factor, angles.sin() * factor
    pairs = (cos, cos), (-sin, sin)  # what multiplies each member of a pair, and what multiplies the other
    cos, sin = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1) for pair in pairs)
    cos, sin = F.pad(cos, (0, 0, num_unrotated, 0), value=1.0), F.pad(sin, (0, 0, num_unrotated, 0))
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def apply_rotary(x: Tensor, rotary: Rotary, interleaved: bool, at_end: bool = False) -> Tensor:
    """Rotate the first r dimensions of each head of `x` (B, S, heads, d), or the last r where `at_end`; the rest stays.

    Pairs are (i, i + r/2) of the r dimensions, or (2i, 2i + 1) where `interleaved`.
    """
    cos, sin = rotary
    if others := x.shape[-1] - cos.shape[-1]:  # ones, so that one product both rotates and copies
        cos = F.pad(cos, (others, 0) if at_end else (0, others), value=1.0)
    return _Rotate.apply(x, cos, sin, interleaved, at_end)


class _Rotate(torch.autograd.Function):
    """Backward rotates the other way; nothing is kept for it but the table. `cos` is (B or 1, S, 1, d) here."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, at_end: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = interleaved, at_end
        return _rotate(x, cos, sin, 1, interleaved, at_end)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1, *ctx.layout), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, interleaved: bool, at_end: bool) -> Tensor:
    rotary_dim, head_dim = sin.shape[-1], x.shape[-1]
    out = x * cos
    if rotary_dim == head_dim:
        return out.addcmul_(_others(x, interleaved), sin, value=direction)
    # One member of the pairs after the other: a GPU copies a part of the heads in order to roll it.
    start = head_dim - rotary_dim if at_end else 0
    parts = (x.narrow(-1, start, rotary_dim), out.narrow(-1, start, rotary_dim), sin)
    (first, second), (first_out, second_out), (first_sin, second_sin) = (_members(one, interleaved) for one in parts)
    first_out.addcmul_(second, first_sin, value=direction)
    second_out.addcmul_(first, second_sin, value=direction)
    return out


def _others(x: Tensor, interleaved: bool) -> Tensor:
    """In the place of each number, the other one of its pair."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)


def _members(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    """The first and the second member of each pair, as views."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
