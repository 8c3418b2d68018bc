"""What a model costs, by arithmetic: parameters and floating-point operations."""

from __future__ import annotations

import math

from megamoe.config.model import ModelConfig

Shape = dict[str, int]  # the fields that make each dimension, in order, and its size


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the model under its plain name, in the model's order."""
    hidden = {"hidden_size": config.hidden_size}
    rows = {"vocab_size": config.vocab_size} | hidden
    shapes = {"model.embed_tokens.weight": rows}
    for block in range(config.num_hidden_layers):
        shapes |= _prefixed(f"model.layers.{block}.", block_shapes(config, config.is_dense(block)))
    shapes["model.norm.weight"] = hidden
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = rows
    if config.num_nextn_predict_layers:
        shapes |= {"model.mtp.embed_norm.weight": hidden, "model.mtp.hidden_norm.weight": hidden}
        shapes["model.mtp.proj.weight"] = hidden | {"2 x hidden_size": 2 * config.hidden_size}
        shapes |= _prefixed("model.mtp.block.", block_shapes(config, dense=False))
        shapes["model.mtp.norm.weight"] = hidden
    return shapes


def block_shapes(config: ModelConfig, dense: bool) -> dict[str, Shape]:
    """Every parameter of a block."""
    hidden = {"hidden_size": config.hidden_size}
    attention = _latent_attention_shapes(config) if config.kv_lora_rank else _attention_shapes(config)
    shapes = {"input_layernorm.weight": hidden, **_prefixed("self_attn.", attention)}
    shapes["post_attention_layernorm.weight"] = hidden
    if dense:
        return shapes | _mlp_shapes(config, "mlp.", {"intermediate_size": config.intermediate_size})
    shapes["moe.router.weight"] = {"num_local_experts": config.num_local_experts} | hidden
    size = config.expert_size_field
    for expert in range(config.num_local_experts):
        shapes |= _mlp_shapes(config, f"moe.experts.{expert}.", {size: config.expert_size})
    if config.n_shared_experts:
        shapes |= _mlp_shapes(config, "shared_mlp.", {f"n_shared_experts x {size}": config.shared_size})
    if config.shared_expert_gate:
        shapes["shared_gate.weight"] = {"1": 1} | hidden
    return shapes


def _prefixed(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def _mlp_shapes(config: ModelConfig, prefix: str, inside: Shape) -> dict[str, Shape]:
    hidden = {"hidden_size": config.hidden_size}
    shapes = {"gate_proj.weight": inside | hidden} if config.gated_mlp else {}
    return _prefixed(prefix, shapes | {"up_proj.weight": inside | hidden, "down_proj.weight": hidden | inside})


def _linear(name: str, rows: Shape, columns: Shape, bias: bool = False) -> dict[str, Shape]:
    return {f"{name}.weight": rows | columns} | ({f"{name}.bias": rows} if bias else {})


def _attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, head, bias = {"hidden_size": config.hidden_size}, {"head_dim": config.head_dim}, config.attention_bias
    query = {"num_attention_heads x head_dim": config.num_attention_heads * config.head_dim}
    key = {"num_key_value_heads x head_dim": config.num_key_value_heads * config.head_dim}
    shapes = {"latents": {"num_latent_tokens": config.num_latent_tokens} | hidden} if config.num_latent_tokens else {}
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        shapes |= _linear(name, rows, hidden, bias)
    shapes |= _linear("o_proj", hidden, query, config.attention_out_bias)
    if config.qk_norm:
        full = config.qk_norm == "full"
        shapes |= {"q_norm.weight": query if full else head, "k_norm.weight": key if full else head}
    return shapes


def _latent_attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    nope, rope, value = config.qk_nope_head_dim or 0, config.qk_rope_head_dim or 0, config.value_dim
    heads, hidden, bias = config.num_attention_heads, {"hidden_size": config.hidden_size}, config.attention_bias
    query = {"num_attention_heads x head_dim": heads * config.head_dim}
    lora, compressed = {"q_lora_rank": config.q_lora_rank or 0}, {"kv_lora_rank": config.kv_lora_rank or 0}
    key = {"kv_lora_rank + qk_rope_head_dim": (config.kv_lora_rank or 0) + rope}
    expanded = {"num_attention_heads x (qk_nope_head_dim + v_head_dim)": heads * (nope + value)}
    values = {"num_attention_heads x v_head_dim": heads * value}
    if config.q_lora_rank:
        shapes = _linear("q_a_proj", lora, hidden, bias) | {"q_a_layernorm.weight": lora}
        shapes |= _linear("q_b_proj", query, lora)
    else:
        shapes = _linear("q_proj", query, hidden)
    shapes |= _linear("kv_a_proj_with_mqa", key, hidden, bias) | {"kv_a_layernorm.weight": compressed}
    shapes |= _linear("kv_b_proj", expanded, compressed)
    return shapes | _linear("o_proj", hidden, values, config.attention_out_bias)


def parameter_count(config: ModelConfig) -> int:
    """All parameters of the model, over all ranks."""
    return sum(math.prod(shape.values()) for shape in parameter_shapes(config).values())


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of forward and backward per token, recomputation not counted.

    2 per weight and token forward, twice that backward; the experts count K times, not E. Attention's two products
    are counted over the positions that a query sees: half of all (causal), or the last ones of a sliding window, and
    all latents. The convention is that of PaLM (arXiv:2204.02311, appendix B), with the causal half.
    """
    head = config.vocab_size * config.hidden_size
    blocks = [
        _block_flops(config, config.is_dense(block), visible_positions(seq_len, config.window(block)))
        for block in range(config.num_hidden_layers)
    ]
    total = sum(blocks) + head
    if config.num_nextn_predict_layers:
        joined = 2 * config.hidden_size**2
        total += joined + _block_flops(config, False, visible_positions(seq_len, config.window(-1))) + head
    return 6.0 * total


def visible_positions(seq_len: int, window: int | None) -> float:
    """Positions that a query sees in the mean, without latents."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window**2 / (2 * seq_len)


def _block_flops(config: ModelConfig, dense: bool, positions: float) -> float:
    """Multiply-adds of a forward pass per token."""
    visible = positions + config.num_latent_tokens
    attention = visible * config.num_attention_heads * (config.head_dim + config.value_dim)
    return attention + active_block_weights(config, dense)


def active_block_weights(config: ModelConfig, dense: bool) -> int:
    """Weights of a block's matrices that multiply a token."""
    shapes = block_shapes(config.model_copy(update={"num_local_experts": config.num_experts_per_tok}), dense)
    shapes.pop("self_attn.latents", None)
    router = (config.num_local_experts - config.num_experts_per_tok) * config.hidden_size  # it has a row for each
    return sum(math.prod(shape.values()) for shape in shapes.values() if len(shape) == 2) + (0 if dense else router)
