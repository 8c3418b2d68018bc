"""The attention of a block, by its configuration. An exported model has this file too."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention import GroupedQueryAttention
from .from_config import from_config
from .latent_attention import MultiHeadLatentAttention
from .rope import softmax_scale


def build_attention(config: Any, rope_scaling: dict[str, Any] | None) -> nn.Module:
    """A new kind of attention is chosen here, and nowhere else.

    Args:
        config: a ModelConfig, or the configuration of an export, in which `rope_scaling` is transformers' own.
    """
    if config.kv_lora_rank is None:
        return from_config(GroupedQueryAttention, config)
    scale = softmax_scale(config.head_dim, rope_scaling)
    return from_config(MultiHeadLatentAttention, config, softmax_scale=scale)
