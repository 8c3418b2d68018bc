"""Small models that together have every part that a configuration can ask for."""

from megamoe.config.model import ModelConfig
from megamoe.model.decoder import Decoder

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "head_dim": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
WINDOWS = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PARTS = {
    "latent_tokens": {"num_latent_tokens": 5},
    "gated_narrow_experts": {"gated_mlp": True, "moe_intermediate_size": 16},
    "shared_experts": {"n_shared_experts": 2, "gated_mlp": True},
    "gated_shared_experts": {"n_shared_experts": 1, "shared_expert_gate": True, "moe_intermediate_size": 16},
    "dense_layers": {"first_k_dense_replace": 1, "mlp_only_layers": [2]},
    "sigmoid_groups": {"router_score": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "quantile_bias": {"router_bias_rule": "quantile"},
    "plain_scores": {"norm_topk_prob": False, "router_bias": False},
    "sequence_loss": {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001, "output_z_loss_coef": 0.0001},
    "global_loss": {"router_aux_loss_coef": 0.01, "router_aux_loss_type": "global_batch", "router_score": "sigmoid"},
    "head_norm_partial_rope": {"qk_norm": "head", "partial_rotary_factor": 0.5, "attention_bias": True},
    "full_norm_out_bias": {"qk_norm": "full", "attention_out_bias": True},
    "sliding": WINDOWS,
    "sliding_multi_token": {**WINDOWS, "num_nextn_predict_layers": 1},
    "latent_attention": LATENT_ATTENTION,
    "compressed_queries": {**LATENT_ATTENTION, "q_lora_rank": 14, "attention_bias": True, "rope_interleaved": True},
    "yarn_latent_attention": {**LATENT_ATTENTION, "rope_scaling": YARN},
    "untied_multi_token": {"tie_word_embeddings": False, "num_nextn_predict_layers": 1, "router_z_loss_coef": 0.01},
}


def model_of(part: str, **changes) -> ModelConfig:
    """The model with one of PARTS."""
    return ModelConfig(**{**SHAPE, **PARTS[part], **changes})


def with_fp32_statistics(model: Decoder) -> Decoder:
    """The model, with the buffers of its routers in fp32 again, as DeepSpeed keeps them."""
    for router in model.routers():
        for name, buffer in list(router.named_buffers()):
            setattr(router, name, buffer.float() if buffer.is_floating_point() else buffer)
    return model
