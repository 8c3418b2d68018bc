"""The part of a configuration that each layer takes, by keyword.

The fields have the names of ModelConfig, so a preset and the configuration of an exported model give the same sections:
`GroupedQueryAttention(**section(AttentionSection, config))`.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, TypeVar, cast


class AttentionSection(TypedDict):
    """What `GroupedQueryAttention` takes."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_latent_tokens: int
    rope_interleaved: bool


class ExpertSection(TypedDict):
    """What `StackedExperts` takes."""

    hidden_size: int
    intermediate_size: int
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
    gated_mlp: bool
    expert_dropout: float


class RouterSection(TypedDict):
    """What `Router` takes."""

    hidden_size: int
    num_local_experts: int
    num_experts_per_tok: int
    router_score: Literal["softmax", "sigmoid"]
    router_jitter_noise: float


Section = TypeVar("Section", AttentionSection, ExpertSection, RouterSection)


def section(kind: type[Section], config: Any) -> Section:
    """The fields of `kind`, out of a configuration that has them all as attributes."""
    return cast(Section, {name: getattr(config, name) for name in kind.__annotations__})
