"""Layers out of a configuration: a preset and the configuration of an exported model have fields of the same names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .attention import GroupedQueryAttention  # relative: an exported model has these files in one folder
from .latent_attention import MultiHeadLatentAttention
from .rope import softmax_scale

Layer = TypeVar("Layer")


def from_config(layer: Callable[..., Layer], config: Any, **own: Any) -> Layer:
    """A layer whose keywords are the fields of `config` of the same names, but for those that are given here.

    Raises AttributeError for a keyword that is neither.
    """
    names = inspect.signature(layer).parameters.keys() - own.keys()
    return layer(**{name: getattr(config, name) for name in names}, **own)


def build_attention(config: Any, rope_scaling: dict[str, Any] | None) -> nn.Module:
    """A new kind of attention is chosen here, and nowhere else.

    Args:
        config: a ModelConfig, or the configuration of an export, in which `rope_scaling` is transformers' own.
    """
    if config.kv_lora_rank is None:
        return from_config(GroupedQueryAttention, config)
    scale = softmax_scale(config.head_dim, rope_scaling)
    return from_config(MultiHeadLatentAttention, config, softmax_scale=scale)
