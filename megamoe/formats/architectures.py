"""The table of architectures: one entry per class of transformers, used for reading and for writing.

An entry says what each key of the class's config.json is among the fields of ModelConfig, and under which names its
files hold the tensors. `config_json.py` and `tensor_names.py` read the table, and only
`upcycle.py` names entries of it, as what a dense class becomes.
Sources: configuration_*.py, modeling_*.py and conversion_mapping.py of transformers 5.24, and published files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """A key of config.json that is a field here."""

    field: str
    """The field of ModelConfig."""
    default: Any = REQUIRED
    """The class's value where the key is missing."""
    also: tuple[str, ...] = ()
    """Further fields that have the same value."""
    alias: str | None = None
    """Another name of the key, which some versions of transformers write."""
    values: Mapping[Any, Any] | None = None
    """The field's value for each of the key's, where they differ."""
    switch: str | None = None
    """A key that must be true for this one to count; it is written too."""
    least: int | None = None
    """The class needs at least this; a missing value (null) is none."""


@dataclass(frozen=True)
class Architecture:
    """What a class of transformers is here."""

    name: str
    model_type: str
    keys: Mapping[str, Key]
    implied: Mapping[str, Any]
    """Fields whose value the class itself implies, where it is not the default of ModelConfig."""
    tensors: Mapping[str, tuple[str, ...]]
    """Names within a layer, `{}` for an expert's number, by the plain ones: the one that is written, then others that
    are read. Plain names that are not here stay as they are."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must have this value, or be missing; written, since servers other than transformers read them."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that must have one of these values, or be missing; of a list, each entry. Not written."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Keys besides `IGNORED` that do not change what the model computes, with the reason."""
    rope_theta: float = 10_000.0
    """The class's default."""
    rotary: str | None = None
    """The key that says which part of a head is rotated: a share (partial_rotary_factor) or a number (rotary_dim)."""
    rotary_default: float = 1.0
    mtp: Mapping[str, str] = field(default_factory=dict)
    """Names of multi-token prediction's own tensors, by the plain ones, in the layer after the last."""

    @property
    def has_bias(self) -> bool:
        """Whether the class holds the balancing bias."""
        return BIAS in self.tensors


ROUTER = "moe.router.weight"
BIAS = "moe.router.selection_bias"

# --- keys of every class ----------------------------------------------------------------------------------------------

COMMON = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "num_hidden_layers": Key("num_hidden_layers"),
    "num_attention_heads": Key("num_attention_heads"),
    "num_key_value_heads": Key("num_key_value_heads"),  # null: as many as query heads
    "num_experts_per_tok": Key("num_experts_per_tok"),
    "hidden_act": Key("hidden_act", "silu"),
    "max_position_embeddings": Key("max_position_embeddings"),
    "rms_norm_eps": Key("rms_norm_eps", 1e-6),
    "tie_word_embeddings": Key("tie_word_embeddings", False),
    "initializer_range": Key("initializer_range", 0.02),
}
# The width inside an expert, in classes with and without dense layers.
EXPERTS_ALONE = {"intermediate_size": Key("moe_intermediate_size", also=("intermediate_size",))}
EXPERTS_AND_DENSE = {
    "intermediate_size": Key("intermediate_size"),
    "moe_intermediate_size": Key("moe_intermediate_size"),
}
HEAD_DIM = {"head_dim": Key("head_dim", None)}
AUX_LOSS = "router_aux_loss_coef"

GROUPS = {
    "n_routed_experts": Key("num_local_experts", alias="num_local_experts"),
    "n_shared_experts": Key("n_shared_experts", 1, least=1),
    "norm_topk_prob": Key("norm_topk_prob", True),
}

ALWAYS = {"attention_dropout": (0.0,), "is_encoder_decoder": (False,)}
FULL_ROTARY = {"partial_rotary_factor": (1.0,)}

_TRAINING = "training alone"
_REASONS = {
    "names the class; the code of the directory is never run": "architectures model_type auto_map _name_or_path",
    "who wrote the file": "transformers_version",
    "the dtype to load in; each tensor of a file has its own": "torch_dtype dtype",
    "ids of tokens, which the tokenizer knows": "bos_token_id eos_token_id pad_token_id",
    "what a call returns": "use_cache output_router_logits output_attentions output_hidden_states return_dict",
    "how it is computed": "_attn_implementation_autoset",
    "of classes with another head": "id2label label2id problem_type",
    "no class here reads it": "chunk_size_feed_forward",
    _TRAINING: "router_jitter_noise router_aux_loss_coef",
}
IGNORED = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
_MTP = "multi-token prediction: the weights say whether there is any"

# --- names of tensors within a layer ----------------------------------------------------------------------------------

# transformers 5 stacks the experts in memory, and in files saved with save_original_format=False: the projections of
# all experts, (E, rows, columns), as (name, place among the stacked projections, number of them).
STACKED = {
    "gate_proj.weight": ("mlp.experts.gate_up_proj", 0, 2),
    "up_proj.weight": ("mlp.experts.gate_up_proj", 1, 2),
    "down_proj.weight": ("mlp.experts.down_proj", 0, 1),
}
MIXTRAL_TENSORS = {
    ROUTER: ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    "moe.experts.{}.gate_proj.weight": ("block_sparse_moe.experts.{}.w1.weight",),
    "moe.experts.{}.up_proj.weight": ("block_sparse_moe.experts.{}.w3.weight",),
    "moe.experts.{}.down_proj.weight": ("block_sparse_moe.experts.{}.w2.weight",),
}
QWEN_TENSORS = {
    ROUTER: ("mlp.gate.weight",),
    "moe.experts.{}.gate_proj.weight": ("mlp.experts.{}.gate_proj.weight",),
    "moe.experts.{}.up_proj.weight": ("mlp.experts.{}.up_proj.weight",),
    "moe.experts.{}.down_proj.weight": ("mlp.experts.{}.down_proj.weight",),
}
DEEPSEEK_TENSORS = {
    **QWEN_TENSORS,
    BIAS: ("mlp.gate.e_score_correction_bias",),
    "shared_mlp.gate_proj.weight": ("mlp.shared_experts.gate_proj.weight",),
    "shared_mlp.up_proj.weight": ("mlp.shared_experts.up_proj.weight",),
    "shared_mlp.down_proj.weight": ("mlp.shared_experts.down_proj.weight",),
}
DEEPSEEK_MTP = {
    "embed_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
# Copies of the embedding and the head, which published files have in that layer too.
MTP_COPIES = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}

# --- the classes ------------------------------------------------------------------------------------------------------

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    keys={
        **COMMON,
        **EXPERTS_ALONE,
        **HEAD_DIM,
        "rms_norm_eps": Key("rms_norm_eps", 1e-5),
        "num_local_experts": Key("num_local_experts", alias="num_experts"),
        "sliding_window": Key("sliding_window", None),
        AUX_LOSS: Key("router_aux_loss_coef", 0.001),
    },
    implied={"gated_mlp": True, "router_bias": False, "router_aux_loss_type": "global_batch"},
    only=ALWAYS | FULL_ROTARY,
    tensors=MIXTRAL_TENSORS,
    rope_theta=1e6,
)

OLMOE = Architecture(
    name="OlmoeForCausalLM",
    model_type="olmoe",
    keys={
        **COMMON,
        **EXPERTS_ALONE,
        "rms_norm_eps": Key("rms_norm_eps", 1e-5),
        "num_key_value_heads": Key("num_key_value_heads", None),
        "num_experts": Key("num_local_experts", alias="num_local_experts"),
        "attention_bias": Key("attention_bias", False, also=("attention_out_bias",)),
        "norm_topk_prob": Key("norm_topk_prob", False),
        AUX_LOSS: Key("router_aux_loss_coef", 0.01),
    },
    implied={"gated_mlp": True, "qk_norm": "full", "router_bias": False, "router_aux_loss_type": "global_batch"},
    only=ALWAYS | FULL_ROTARY | {"clip_qkv": (None,)},
    tensors=QWEN_TENSORS,
)

QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    keys={
        **COMMON,
        **EXPERTS_AND_DENSE,
        **HEAD_DIM,
        "num_experts": Key("num_local_experts", alias="num_local_experts"),
        "attention_bias": Key("attention_bias", False, also=("attention_out_bias",)),
        "sliding_window": Key("sliding_window", 4096, switch="use_sliding_window"),
        "mlp_only_layers": Key("mlp_only_layers", ()),
        "norm_topk_prob": Key("norm_topk_prob", False),
        AUX_LOSS: Key("router_aux_loss_coef", 0.001),
    },
    implied={"gated_mlp": True, "qk_norm": "head", "router_bias": False, "router_aux_loss_type": "global_batch"},
    stated={"decoder_sparse_step": 1},
    only=ALWAYS
    | FULL_ROTARY
    | {"qkv_bias": (False,), "use_qk_norm": (True,), "shared_expert_intermediate_size": (0, None)},
    ignored={"max_window_layers": "the class does not read it"},
    tensors=QWEN_TENSORS,
)

MINIMAX_M2 = Architecture(
    name="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    keys={
        **COMMON,
        **EXPERTS_ALONE,
        "head_dim": Key("head_dim", 128),
        "num_local_experts": Key("num_local_experts", alias="num_experts"),
    },
    implied={"gated_mlp": True, "qk_norm": "full", "router_score": "sigmoid"},
    stated={"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"},
    only=ALWAYS
    | {
        "attn_type_list": (1,),
        "sliding_window": (None,),
        "shared_intermediate_size": (0,),
        "layernorm_full_attention_beta": (1.0,),
        "layernorm_linear_attention_beta": (1.0,),
        "layernorm_mlp_beta": (1.0,),
    },
    ignored={
        "mlp_intermediate_size": "no layer is dense",
        "shared_moe_mode": "there is no shared expert",
        "num_mtp_modules": _MTP,
        "mtp_transformer_layers": _MTP,
        "use_mtp": _MTP,
    },
    tensors={
        **MIXTRAL_TENSORS,
        BIAS: ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
    },
    rope_theta=5e6,
    rotary="rotary_dim",
)

GLM4_MOE = Architecture(
    name="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    keys={
        **COMMON,
        **EXPERTS_AND_DENSE,
        **HEAD_DIM,
        **GROUPS,
        "rms_norm_eps": Key("rms_norm_eps", 1e-5),
        "attention_bias": Key("attention_bias", False),
        "use_qk_norm": Key("qk_norm", False, values={True: "head", False: None}),
        "first_k_dense_replace": Key("first_k_dense_replace", 1),
        "routed_scaling_factor": Key("routed_scaling_factor", 1.0),
        "n_group": Key("n_group", 1, least=1),
        "topk_group": Key("topk_group", 1, least=1),
    },
    implied={"gated_mlp": True, "router_score": "sigmoid"},
    only=ALWAYS | {"scoring_func": ("sigmoid",)},
    ignored={"num_nextn_predict_layers": _MTP, "num_mtp_layers": _MTP},
    tensors=DEEPSEEK_TENSORS,
    rotary="partial_rotary_factor",
    rotary_default=0.5,
    mtp=DEEPSEEK_MTP,
)

DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    keys={
        **COMMON,
        **EXPERTS_AND_DENSE,
        **GROUPS,
        "attention_bias": Key("attention_bias", False, also=("attention_out_bias",)),
        "first_k_dense_replace": Key("first_k_dense_replace", 3),
        "kv_lora_rank": Key("kv_lora_rank", 512, least=1),
        "q_lora_rank": Key("q_lora_rank", 1536),
        "qk_nope_head_dim": Key("qk_nope_head_dim", 128, least=1),
        "qk_rope_head_dim": Key("qk_rope_head_dim", 64, least=1),
        "v_head_dim": Key("v_head_dim", 128, least=1),
        "rope_interleave": Key("rope_interleaved", True),
        "routed_scaling_factor": Key("routed_scaling_factor", 2.5),
        "n_group": Key("n_group", 8, least=1),
        "topk_group": Key("topk_group", 4, least=1),
    },
    implied={"gated_mlp": True, "router_score": "sigmoid"},
    stated={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    only=ALWAYS | FULL_ROTARY,
    ignored={
        "num_nextn_predict_layers": _MTP,
        "num_mtp_layers": _MTP,
        "head_dim": "computed from qk_rope_head_dim",
        "qk_head_dim": "computed from qk_nope_head_dim and qk_rope_head_dim",
        "pretraining_tp": "the class does not read it",
        "ep_size": "how it was trained",
        "aux_loss_alpha": _TRAINING,
        "seq_aux": _TRAINING,
    },
    tensors=DEEPSEEK_TENSORS,
    mtp=DEEPSEEK_MTP,
)

ARCHITECTURES = {one.name: one for one in (MIXTRAL, OLMOE, QWEN3_MOE, MINIMAX_M2, GLM4_MOE, DEEPSEEK_V3)}
