"""Parts of attention as formulas in float64, one vector at a time, with nothing of megamoe's; and what a test of an
attention needs around it."""

from __future__ import annotations

from typing import Any

import torch
from operators import Operators, rms_norm_as_one_operator
from torch import Tensor, nn

from megamoe.model.attention import LayerCache, attention_mask
from megamoe.model.rope import Rotary, rotary_table

THETA = 100.0
# Left padding, and none.
REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()


def positions_of(real: Tensor) -> Tensor:
    """(B, S): how many real tokens stand before each."""
    return (real.cumsum(1) - 1).clamp_min(0)


def turned(vector: Tensor, position: int, interleaved: bool) -> Tensor:
    """Each pair as a complex number, times e^(i position θ^(-2k/r))."""
    angles = position * THETA ** -(torch.arange(0, len(vector), 2, dtype=torch.float64) / len(vector))
    first, second = (vector[0::2], vector[1::2]) if interleaved else vector.chunk(2)
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack((pairs.real, pairs.imag), 1).flatten() if interleaved else torch.cat((pairs.real, pairs.imag))


def normed(vector: Tensor, weight: Tensor, eps: float) -> Tensor:
    return vector / (vector.pow(2).mean() + eps).sqrt() * weight


def average(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    weights = torch.stack([(query * key).sum() * scale for key in keys]).exp()
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / weights.sum()


def exact_rotary(positions: Tensor, rotary_dim: int, interleaved: bool = False, num_unrotated: int = 0) -> Rotary:
    """A table with angles in float64."""
    frequencies = THETA ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return rotary_table(positions, frequencies.unsqueeze(0), 1.0, torch.float64, interleaved, num_unrotated)


def in_pieces(layer: Any, x: Tensor, rotary: Rotary, real: Tensor, num_latents: int, window: int | None) -> Tensor:
    """The layer's outputs from a cache: three tokens, then one after the other."""
    cache = LayerCache(num_latents + x.shape[1])
    outs, past = [], 0
    for end in range(3, x.shape[1] + 1):
        mask = attention_mask(real[:, :end], end - past, num_latents, window)
        rotated = slice(num_latents + past if past else 0, num_latents + end)  # the latents come with the first tokens
        outs.append(layer(x[:, past:end], tuple(part[:, rotated] for part in rotary), mask, cache))
        past = end
    return torch.cat(outs, dim=1)


def operators_of(layer: Any, rotary_dim: int, length: int = 16) -> Operators:
    """Those of a layer's forward and backward pass in bf16."""
    layer = layer.bfloat16()
    hidden_size = layer.o_proj.out_features
    x = torch.randn(2, length, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = tuple(part.bfloat16() for part in exact_rotary(torch.arange(length).unsqueeze(0), rotary_dim))
    grad = torch.randn(2, length, hidden_size, dtype=torch.bfloat16)
    operators = Operators()
    plain = nn.RMSNorm.forward
    nn.RMSNorm.forward = rms_norm_as_one_operator(operators)
    try:
        with operators:
            layer(x, rotary).backward(grad)
    finally:
        nn.RMSNorm.forward = plain
    return operators
