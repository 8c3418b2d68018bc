"""What a model costs, by arithmetic: parameters and floating-point operations."""

from __future__ import annotations

import math

from megamoe.config import ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Every parameter of the model under its plain name, as a shape: the fields that make each dimension, in order,
    and its size."""
    hidden = {"hidden_size": config.hidden_size}
    query = {"num_attention_heads x head_dim": config.num_attention_heads * config.head_dim}
    key_value = {"num_key_value_heads x head_dim": config.num_key_value_heads * config.head_dim}
    inside = {"intermediate_size": config.intermediate_size}
    layer = {
        "input_layernorm.weight": hidden,
        "self_attn.latents": {"num_latent_tokens": config.num_latent_tokens} | hidden,
        "self_attn.q_proj.weight": query | hidden,
        "self_attn.k_proj.weight": key_value | hidden,
        "self_attn.v_proj.weight": key_value | hidden,
        "self_attn.o_proj.weight": hidden | query,
        "post_attention_layernorm.weight": hidden,
        "moe.router.weight": {"num_local_experts": config.num_local_experts} | hidden,
    }
    for expert in range(config.num_local_experts):
        if config.gated_mlp:
            layer[f"moe.experts.{expert}.gate_proj.weight"] = inside | hidden
        layer[f"moe.experts.{expert}.up_proj.weight"] = inside | hidden
        layer[f"moe.experts.{expert}.down_proj.weight"] = hidden | inside
    layers = {
        f"model.layers.{number}.{name}": shape
        for number in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    embedding = {"model.embed_tokens.weight": {"vocab_size": config.vocab_size} | hidden}
    return embedding | layers | {"model.norm.weight": hidden}


def parameter_count(config: ModelConfig) -> int:
    """All parameters of the model, over all ranks."""
    return sum(math.prod(shape.values()) for shape in parameter_shapes(config).values())


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of forward and backward per token, recomputation not counted.

    2 per weight and token forward, twice that backward; the experts count K times, not E. Attention's two products
    are counted over half the positions (causal) and all latents. The convention is that of PaLM (arXiv:2204.02311,
    appendix B), with the causal half.
    """
    router = config.num_local_experts * config.hidden_size
    weights = _attention_weights(config) + config.num_experts_per_tok * _expert_weights(config) + router
    head = config.vocab_size * config.hidden_size
    visible = seq_len / 2 + config.num_latent_tokens
    attention = 2 * visible * config.num_attention_heads * config.head_dim  # score and value products, multiply-adds
    return 6.0 * (config.num_hidden_layers * (weights + attention) + head)


def _attention_weights(config: ModelConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    return heads * config.head_dim * config.hidden_size


def _expert_weights(config: ModelConfig) -> int:
    return (3 if config.gated_mlp else 2) * config.hidden_size * config.intermediate_size
