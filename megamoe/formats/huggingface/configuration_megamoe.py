"""The configuration of an exported megamoe model for transformers; field names are those of megamoe's presets."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class MegaMoeConfig(PreTrainedConfig):
    """Shape of the decoder; see megamoe/config/model.py for each field, except:

    rope_parameters: the preset's rope_theta, with what its rope_scaling holds; rope_type "default" where it has none.
    layer_types: always has an entry per layer.
    """

    model_type = "megamoe"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - transformers' own form

    vocab_size: int = 49152
    hidden_size: int = 768
    num_hidden_layers: int = 24
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    num_nextn_predict_layers: int = 0  # whether the weights of multi-token prediction are there; they are not used

    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    head_dim: int = 64
    num_latent_tokens: int = 8
    qk_norm: str | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] = field(default_factory=list)
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None

    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    rope_interleaved: bool = False
    partial_rotary_factor: float = 1.0

    intermediate_size: int = 2048
    moe_intermediate_size: int | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = False
    first_k_dense_replace: int = 0
    mlp_only_layers: list[int] = field(default_factory=list)
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 0
    shared_expert_gate: bool = False
    expert_dropout: float = 0.0

    router_score: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_jitter_noise: float = 0.0
    router_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        kind = "sliding_attention" if self.sliding_window else "full_attention"
        self.layer_types = self.layer_types or [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        # A quotient may be rounded.
        return self.qk_rope_head_dim or int(self.head_dim * self.partial_rotary_factor + 1e-6)

    @property
    def expert_size(self) -> int:
        """Width inside an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has one MLP in place of experts."""
        return layer < self.first_k_dense_replace or layer in self.mlp_only_layers
