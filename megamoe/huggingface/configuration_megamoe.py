"""The configuration of an exported megamoe model for transformers; field names are those of megamoe's presets."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MegaMoeConfig(PretrainedConfig):
    """Shape of the decoder; see megamoe/config.py for each field."""

    model_type = "megamoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 4,
        head_dim: int = 64,
        num_latent_tokens: int = 8,
        max_position_embeddings: int = 1024,
        rope_parameters: dict[str, Any] | None = None,
        rope_interleaved: bool = False,
        rms_norm_eps: float = 1e-5,
        num_local_experts: int = 8,
        num_experts_per_tok: int = 2,
        hidden_act: str = "silu",
        gated_mlp: bool = False,
        expert_dropout: float = 0.0,
        router_jitter_noise: float = 0.0,
        router_score: str = "softmax",
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        """
        Args:
            rope_parameters: rope_theta of the preset, with what its rope_scaling holds; rope_type "default" where it
                has none.
        """
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.num_latent_tokens = num_latent_tokens
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
        self.rope_interleaved = rope_interleaved
        self.rms_norm_eps = rms_norm_eps
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.expert_dropout = expert_dropout
        self.router_jitter_noise = router_jitter_noise
        self.router_score = router_score
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})
