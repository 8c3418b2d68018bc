"""Grouped-query attention over learned latent (prefix) tokens and the sequence; mask, attention and key/value cache for
attention of any kind.

Shape legend: B batch, T query positions, S cached and new token positions, M latent tokens, D hidden_size,
H query heads, G key/value heads, d head_dim, v the width of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .rope import Rotary, apply_rotary  # relative: an exported model has these files in one folder


def attention_mask(token_mask: Tensor, num_queries: int, num_latents: int, sliding_window: int | None = None) -> Tensor:
    """What each query may see: all latents, and the real tokens up to itself.

    Args:
        token_mask: (B, S), True at real tokens; the queries are its last `num_queries` positions.
        sliding_window: of the tokens, a query sees itself and those at the sliding_window - 1 positions before it.

    Returns (B, 1, T, M + S) bool. A padded query also sees itself, so that no softmax is over nothing.
    """
    length = token_mask.shape[1]
    keys = torch.arange(length, device=token_mask.device)
    queries = keys[length - num_queries :].unsqueeze(1)
    visible = ((keys <= queries) & token_mask.unsqueeze(1)) | (keys == queries)
    if sliding_window is not None:
        visible &= keys > queries - sliding_window
    return F.pad(visible, (num_latents, 0), value=True).unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Each query's average of the values; returns (B, T, H * v).

    Args:
        query: (B, H, T, d)
        key: (B, G, S, d)
        value: (B, G, S, v)
        mask: (B, 1, T, S) from `attention_mask`; None means causal, with T = S.
        scale: on the scores; None means 1 / sqrt(d).
    """
    groups, kernels = query.shape[1] // key.shape[1], kernel_order(query, value.shape[-1], mask is not None)
    if groups > 1 and SDPBackend.FLASH_ATTENTION not in kernels and (query.is_cuda or query.is_meta):
        # The memory-efficient kernel, which these take, has no groups: each query head gets keys of its own. Without
        # values (meta) as on a GPU, for plans.
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    with sdpa_kernel(kernels, set_priority=True) if query.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    return out.transpose(1, 2).flatten(2)


def kernel_order(query: Tensor, value_width: int, is_masked: bool) -> list[SDPBackend]:
    """The kernels that a GPU may take, the one that we choose first; torch's own choice differs with GPU and version.

    Flash attention takes 16 bits, heads of up to 256, values of the keys' width and no mask; cuDNN's takes narrower
    values too, but does not repeat bit for bit, and with a mask its backward gives NaN for some (pytorch issue 196678).
    """
    fused = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if is_masked or query.dtype not in (torch.bfloat16, torch.float16):
        return fused
    takes_flash = value_width == query.shape[-1] <= 256
    return [SDPBackend.FLASH_ATTENTION if takes_flash else SDPBackend.CUDNN_ATTENTION, *fused]


class LayerCache:
    """Keys and values of one layer, latents first, in memory for `capacity` positions allocated at the first append."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # positions held
        self._stores: list[Tensor] = []  # of the keys and of the values

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys (B, G, new, d) and values (B, G, new, v); return all of them, (B, G, length, d) and (..., v)."""
        new = (key, value)
        if not self._stores:
            self._stores = [one.new_empty(*one.shape[:2], self.capacity, one.shape[3]) for one in new]
        end = self.length + key.shape[2]
        for store, one in zip(self._stores, new, strict=True):
            store[:, :, self.length : end] = one
        self.length = end
        keys, values = (store[:, :, :end] for store in self._stores)
        return keys, values


class GroupedQueryAttention(nn.Module):
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
        num_latent_tokens: int = 0,
        rope_interleaved: bool = False,
        qk_norm: Literal["head", "full"] | None = None,
        attention_bias: bool = False,
        attention_out_bias: bool = False,
        rms_norm_eps: float = 1e-5,
    ):
        """
        Args:
            qk_norm: RMSNorm of queries and keys before they are rotated: over each head, by weights that the heads
                share (as Qwen3-MoE), or over all heads together (as OLMoE).
            attention_bias: biases of the query, key and value projections.
            attention_out_bias: a bias of the output projection.
        """
        super().__init__()
        query_size, key_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.head_dim = head_dim
        self.rope_interleaved = rope_interleaved
        self.attend: Callable[..., Tensor] = attend  # an exported model puts the one that transformers names here
        self.latents = nn.Parameter(torch.empty(num_latent_tokens, hidden_size)) if num_latent_tokens else None
        self.q_proj = nn.Linear(hidden_size, query_size, bias=attention_bias)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=attention_bias)
        self.v_proj = nn.Linear(hidden_size, key_size, bias=attention_bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=attention_out_bias)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            widths = (query_size, key_size) if qk_norm == "full" else (head_dim, head_dim)
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=rms_norm_eps) for width in widths)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend from `x` (B, T, D) to itself, the latents and what `cache` holds; returns (B, T, D).

        Args:
            rotary: of the T positions; before them M that are not rotated, where `cache` does not hold the latents yet.
            mask: (B, 1, T, M + S) from `attention_mask`; None means no padding, no window and an empty cache.
        """
        batch, length, _ = x.shape
        if self.latents is not None and (cache is None or cache.length == 0):
            x = torch.cat((self.latents.expand(batch, -1, -1), x), dim=1)
        query = self._rotated(self.q_proj(x), self.q_norm, rotary)
        key = self._rotated(self.k_proj(x), self.k_norm, rotary)
        value = self._heads(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        # Plain causal attention over M + T positions gives every token all latents, and the fast kernels have it. It
        # wants as many queries as keys, so the latents send some too, whose results are cut off.
        query = query if mask is None else query[:, :, -length:]
        return self.o_proj(self.attend(query, key, value, mask))[:, -length:]

    def _rotated(self, x: Tensor, norm: nn.RMSNorm | None, rotary: Rotary) -> Tensor:
        if norm is not None:  # over a head or over all of them, by its width
            x = norm(x.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2)
        return apply_rotary(self._heads(x), rotary, self.rope_interleaved).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (..., T, heads, d)
