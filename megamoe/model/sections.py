"""The part of a configuration that each layer takes, by keyword.

The names are those of ModelConfig, so a preset and the configuration of an exported model give the same sections:
`GroupedQueryAttention(**section(AttentionSection, config))`.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, TypeVar, cast

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]


class AttentionSection(TypedDict):
    """What `GroupedQueryAttention` takes."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_latent_tokens: int
    rope_interleaved: bool
    qk_norm: Literal["head", "full"] | None
    attention_bias: bool
    attention_out_bias: bool
    rms_norm_eps: float


class LatentAttentionSection(TypedDict):
    """What `MultiHeadLatentAttention` takes, without its softmax scale and its own epsilon."""

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleaved: bool
    attention_bias: bool
    attention_out_bias: bool


class MLPSection(TypedDict):
    """What `MLP` takes, without its width."""

    hidden_size: int
    hidden_act: Activation
    gated_mlp: bool


class ExpertSection(TypedDict):
    """What `StackedExperts` takes."""

    hidden_size: int
    expert_size: int
    hidden_act: Activation
    gated_mlp: bool
    expert_dropout: float


class RouterSection(TypedDict):
    """What `Router` takes, without its losses."""

    hidden_size: int
    num_local_experts: int
    num_experts_per_tok: int
    router_score: Literal["softmax", "sigmoid"]
    router_jitter_noise: float
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    router_bias: bool


Section = TypeVar("Section", AttentionSection, LatentAttentionSection, MLPSection, ExpertSection, RouterSection)


def section(kind: type[Section], config: Any) -> Section:
    """The fields of `kind`, out of a configuration that has them all as attributes."""
    return cast(Section, {name: getattr(config, name) for name in kind.__annotations__})
