"""Which architecture of llama.cpp holds a model, and what is said where none does."""

from refusals import has, only, refusals
from test_gguf_file import DEEPSEEK, GLM_4, LLAMA, MINIMAX, OLMOE, OTHERWISE, QWEN_3, YARN, preset

from megamoe.config.model import ModelConfig, load_preset
from megamoe.formats.config_json import TRAINING
from megamoe.formats.gguf_models import GGUF_ARCHITECTURES, architecture_of, problems

BY_NAME = {architecture.name: architecture for architecture in GGUF_ARCHITECTURES}


REFUSED = [
    ("llama", LLAMA | {"hidden_act": "gelu"}, 'hidden_act is "gelu", but llama takes "silu"'),
    ("llama", LLAMA | {"gated_mlp": False}, "gated_mlp is false, but llama takes true"),
    ("llama", LLAMA | {"num_latent_tokens": 2}, "num_latent_tokens is 2, but llama takes 0"),
    ("llama", LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but llama takes 1.0"),
    ("llama", LLAMA | {"norm_topk_prob": False}, "norm_topk_prob is false, but llama takes true"),
    ("llama", LLAMA | {"n_shared_experts": 1}, "n_shared_experts is 1, but llama takes 0"),
    ("llama", LLAMA | {"sliding_window": 8}, "sliding_window is 8, but llama.cpp's attention sees all 64"),
    ("llama", LLAMA | {"mlp_only_layers": [1]}, "block 1 is dense, but llama has experts in all blocks"),
    ("llama", LLAMA | {"num_local_experts": 1025}, "num_local_experts is 1025, but llama takes up to 1024"),
    ("llama", LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'the type "dynamic", but llama'),
    ("llama", LLAMA | {"rope_scaling": YARN | {"beta_fast": 16}}, "beta_fast 16, but llama.cpp takes 32"),
    ("olmoe", OLMOE | {"num_key_value_heads": 2}, "num_key_value_heads is 2, but olmoe takes num_attention"),
    ("olmoe", OLMOE | {"head_dim": 24}, "num_attention_heads x head_dim is 96, but olmoe takes hidden_size 64"),
    ("qwen3moe", QWEN_3 | {"attention_out_bias": True}, "attention_out_bias is true, but qwen3moe takes false"),
    ("qwen3moe", QWEN_3 | {"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0, but qwen3moe takes 1.0"),
    ("qwen3moe", OTHERWISE["llama"] | {"qk_norm": "head", "attention_out_bias": False}, 'type "llama3", but qwen'),
    ("minimax-m2", MINIMAX | {"norm_topk_prob": False}, "norm_topk_prob is false, but minimax-m2 takes true"),
    ("glm4moe", GLM_4 | {"qk_norm": "full"}, 'qk_norm is "full", but glm4moe takes null or "head"'),
    ("glm4moe", GLM_4 | {"shared_expert_gate": True}, "shared_expert_gate is true, but glm4moe takes false"),
    ("glm4moe", GLM_4 | {"mlp_only_layers": [2]}, "block 2 is dense behind one with experts"),
    ("deepseek2", DEEPSEEK | {"n_shared_experts": 0}, "n_shared_experts is 0, but deepseek2 takes 1 or more"),
    ("deepseek2", DEEPSEEK | {"attention_bias": True}, "attention_bias is true, but deepseek2 takes false"),
    ("deepseek2", DEEPSEEK | {"rope_scaling": YARN}, "mscale and mscale_all_dim, or none, but deepseek2"),
    ("deepseek2", DEEPSEEK | {"num_hidden_layers": 27}, "q_lora_rank is 40, but deepseek2 of 27 layers takes null"),
]  # fmt: skip


def test_what_an_architecture_cannot_hold_is_named():
    for name, changes, words in REFUSED:
        has(only(problems(preset(changes), BY_NAME[name], biased=False)), words)


def test_every_field_is_held_by_llama_cpp_or_its_default_is_asked_for():
    held = {
        "rms_norm_eps", "tie_word_embeddings", "head_dim", "intermediate_size", "moe_intermediate_size", "vocab_size",
        "num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group", "rope_theta",
        "rope_scaling", "rope_interleaved", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "layer_types", "sliding_window", "hidden_size", "max_position_embeddings", "first_k_dense_replace",
        "mlp_only_layers",
    }  # fmt: skip
    asked = {field for architecture in GGUF_ARCHITECTURES for field in architecture.takes}
    assert held | asked | TRAINING == set(ModelConfig.model_fields)


def test_a_bias_that_is_not_zero_needs_an_architecture_with_one():
    config = preset(QWEN_3 | {"router_bias": True})
    assert architecture_of(config, biased=False).name == "qwen3moe"
    has(
        only(refusals(architecture_of, config, True)), "balancing bias (router_bias) is not zero, but qwen3moe has none"
    )


def test_a_window_beyond_the_longest_sequence_and_all_groups_are_no_limit():
    config = preset(LLAMA | {"sliding_window": 64, "n_group": 4, "topk_group": 4})
    assert architecture_of(config, False).name == "llama"


def test_a_model_that_fits_none_hears_every_field_of_the_nearest():
    said = refusals(architecture_of, load_preset("moe-680m"), True)
    has("\n".join(said), "num_latent_tokens", "gated_mlp", "router_bias", "a folder, for transformers")
