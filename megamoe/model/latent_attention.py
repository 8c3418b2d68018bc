"""DeepSeek's multi-head latent attention: keys and values of all heads from one narrow vector per token.

Shape legend: B batch, T query positions, S cached and new positions, D hidden_size, H heads, n and r the dimensions of
a query's or key's head that are not rotated and that are, v the width of a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .attention import LayerCache, attend  # relative: an exported model has these files in one folder
from .rope import Rotary, apply_rotary

# Of the norms of compressed vectors, in DeepSeek's code and in transformers, whatever the model's other norms have.
COMPRESSED_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose keys and values are projected from a compressed vector of width `kv_lora_rank`, while one
    rotated key of width r serves all heads. With `q_lora_rank` the queries are compressed too.

    The cache holds the keys and values of the heads, not the compressed vectors.
    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1; names and layouts of transformers' DeepseekV3Attention.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope_interleaved: bool = False,
        attention_bias: bool = False,
        attention_out_bias: bool = False,
        softmax_scale: float | None = None,
    ):
        """
        Args:
            attention_bias: biases of the projections to the compressed vectors.
            attention_out_bias: a bias of the output projection.
            softmax_scale: on the scores; None means 1 / sqrt(n + r). Yarn has its own, see `rope.softmax_scale`.
        """
        super().__init__()
        self.num_heads = num_attention_heads
        self.rope_interleaved = rope_interleaved
        self.scale = softmax_scale
        self.attend: Callable[..., Tensor] = attend  # an exported model puts the one that transformers names here
        self.compressed_sizes = (kv_lora_rank, qk_rope_head_dim)
        self.head_sizes = (qk_nope_head_dim, v_head_dim)
        query_size = num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=attention_bias)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=COMPRESSED_NORM_EPS)
            self.q_b_proj = nn.Linear(q_lora_rank, query_size, bias=False)
        self.is_query_compressed = q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, sum(self.compressed_sizes), bias=attention_bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=COMPRESSED_NORM_EPS)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_attention_heads * sum(self.head_sizes), bias=False)
        self.o_proj = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias=attention_out_bias)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend from `x` (B, T, D) to itself and what `cache` holds; returns (B, T, D).

        Args:
            rotary: of the T positions, for r dimensions.
            mask: (B, 1, T, S) from `attention_mask`; None means no padding, no window and an empty cache.
        """
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.is_query_compressed else self.q_proj(x)
        query = apply_rotary(self._heads(query), rotary, self.rope_interleaved, at_end=True).transpose(1, 2)
        compressed, rotated_key = self.kv_a_proj_with_mqa(x).split(self.compressed_sizes, -1)
        rotated_key = apply_rotary(rotated_key.unsqueeze(2), rotary, self.rope_interleaved)  # (B, T, 1, r)
        # Split, not sliced: backward joins the gradients in one copy.
        key, value = self._heads(self.kv_b_proj(self.kv_a_layernorm(compressed))).split(self.head_sizes, -1)
        key = torch.cat((key, rotated_key.expand(-1, -1, self.num_heads, -1)), -1).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        if mask is None:
            return self.o_proj(self._attend_causally(query, key, value))
        return self.o_proj(self.attend(query, key, value, mask, self.scale))

    def _attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attend` with values as torch's fused kernels want them.

        By its sources (aten/src/ATen/native/transformers: sdp_utils_cpp.cpp, cuda/sdp_utils.cpp) flash takes values of
        the keys' width only, and a CPU has no other fused kernel. Of a GPU's, the memory-efficient one takes other
        widths, and cuDNN's, which `kernel_order` asks for first, keys of 192 with values of 128 that are contiguous.
        """
        width, missing = value.shape[-1], key.shape[-1] - value.shape[-1]
        if query.is_cuda or query.is_meta:  # without values as on a GPU, for plans
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
        elif missing > 0:
            value = torch.cat((value, value.new_zeros(1).expand(*value.shape[:-1], missing)), -1)
        out = self.attend(query, key, value, None, self.scale)
        return self._heads(out)[..., :width].flatten(2) if value.shape[-1] > width else out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, T, H, ...)
