"""What a model costs, by arithmetic: parameters and floating-point operations."""

from __future__ import annotations

from megamoe.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """All parameters of the model, over all ranks."""
    attention = _attention_weights(config) + config.num_latent_tokens * config.hidden_size
    experts = config.num_local_experts * _expert_weights(config)
    router = config.num_local_experts * config.hidden_size
    norms = 2 * config.hidden_size
    layer = attention + experts + router + norms
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer + config.hidden_size


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of forward and backward per token, recomputation not counted.

    2 per weight and token forward, twice that backward; the experts count K times, not E. Attention's two products
    are counted over half the positions (causal) and all latents. The convention is that of PaLM (arXiv:2204.02311,
    appendix B), with the causal half.
    """
    router = config.num_local_experts * config.hidden_size
    weights = _attention_weights(config) + config.num_experts_per_tok * _expert_weights(config) + router
    head = config.vocab_size * config.hidden_size
    seen = seq_len / 2 + config.num_latent_tokens
    attention = 2 * seen * config.num_attention_heads * config.head_dim  # score and value products, multiply-adds
    return 6.0 * (config.num_hidden_layers * (weights + attention) + head)


def _attention_weights(config: ModelConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    return heads * config.head_dim * config.hidden_size


def _expert_weights(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.intermediate_size
