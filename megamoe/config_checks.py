"""What does not fit between the fields of a model's configuration, one sentence each.

Every check passes over fields that are wrong themselves, so that all problems are found at once.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from megamoe.errors import shown, unknown_key

# Limits far above any real model; they keep a slip of the pen from filling the memory.
MAX_LAYERS = 10_000
MAX_EXPERTS = 2**18  # of all layers together
MAX_SIZE = 2**24  # of a dimension

ROPE_SCALINGS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
ROPE_SCALING_KEYS = {
    "rope_type",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}.union(*ROPE_SCALINGS.values())
LATENT_ATTENTION = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # all of them or none


def field_problems(values: dict[str, Any]) -> list[str]:
    """Of a model's fields by name, checked or not."""
    return [
        *_size_problems(values),
        *_block_problems(values),
        *_router_problems(values),
        *_attention_problems(values),
        *_rope_scaling_problems(values.get("rope_scaling")),
    ]


def _positive(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    heads, key_value_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if _positive(heads) and _positive(key_value_heads) and heads % key_value_heads:
        problems.append(
            f"num_attention_heads is {heads}, not a multiple of num_key_value_heads {key_value_heads}; "
            "choose a divisor of it."
        )
    layers, experts = values.get("num_hidden_layers"), values.get("num_local_experts")
    if _positive(layers) and _positive(experts) and layers <= MAX_LAYERS and layers * experts > MAX_EXPERTS >= experts:
        problems.append(
            f"num_hidden_layers {layers} x num_local_experts {experts} is {layers * experts:,} experts, above the "
            f"limit of {MAX_EXPERTS:,}; lower one of them."
        )
    return problems


def _block_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    layers, first, listed, types = (
        values.get(name) for name in ("num_hidden_layers", "first_k_dense_replace", "mlp_only_layers", "layer_types")
    )
    if not _positive(layers):
        return []
    dense = set(range(first)) if _positive(first) and first <= MAX_LAYERS else set()
    if isinstance(listed, list) and all(isinstance(block, int) for block in listed):
        dense |= set(listed)
        if outside := sorted(block for block in listed if not 0 <= block < layers):
            problems.append(
                f"mlp_only_layers has {outside[0]}, but the {layers} blocks are 0 to {layers - 1}; remove it."
            )
    if dense >= set(range(min(layers, MAX_LAYERS))):
        problems.append(
            f"all {layers} blocks are dense (first_k_dense_replace {shown(first)}, mlp_only_layers {shown(listed)}); "
            "leave one with experts."
        )
    if isinstance(types, list) and len(types) != layers:
        problems.append(f"layer_types has {len(types)} entries for {layers} blocks; give one for each.")
    if isinstance(types, list) and "sliding_attention" in types and values.get("sliding_window") is None:
        problems.append("layer_types has sliding layers without a sliding_window; give its number of positions.")
    if values.get("shared_expert_gate") is True and not values.get("n_shared_experts"):
        problems.append("shared_expert_gate is true without shared experts; set n_shared_experts, or leave it out.")
    return problems


def _router_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    top_k, experts, groups, chosen = (
        values.get(name, default)
        for name, default in (
            ("num_experts_per_tok", None), ("num_local_experts", None), ("n_group", 1), ("topk_group", 1)
        )
    )  # fmt: skip
    if _positive(top_k) and _positive(experts) and top_k > experts:
        problems.append(f"num_experts_per_tok is {top_k}, above num_local_experts {experts}; lower it.")
    if not (_positive(groups) and _positive(chosen) and _positive(experts)):
        return problems
    if chosen > groups:
        problems.append(f"topk_group is {chosen}, above n_group {groups}; lower it.")
    elif experts % groups or (groups > 1 and experts // groups < 2):
        problems.append(
            f"n_group {groups} does not divide num_local_experts {experts} into groups of two or more; choose another."
        )
    elif _positive(top_k) and experts >= top_k > chosen * experts // groups:
        problems.append(
            f"num_experts_per_tok is {top_k}, above the {chosen * experts // groups} experts of topk_group {chosen} "
            f"groups; raise topk_group."
        )
    return problems


def _attention_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    head_dim, factor, latents = (
        values.get("head_dim"), values.get("partial_rotary_factor", 1.0), values.get("num_latent_tokens")
    )  # fmt: skip
    if _positive(head_dim) and isinstance(factor, float) and 0 < factor < 1:
        rotated = int(head_dim * factor)
        if rotated < 2 or rotated % 2:
            problems.append(
                f"partial_rotary_factor {factor} rotates {rotated} of the {head_dim} dimensions of a head; RoPE turns "
                "pairs, so choose an even number of 2 or more."
            )
    if _positive(latents) and values.get("sliding_window") is not None:
        problems.append("sliding_window cannot be combined with num_latent_tokens; set one of them to none or 0.")
    given = [name for name in (*LATENT_ATTENTION, "q_lora_rank") if values.get(name) is not None]
    if not given:
        return problems
    missing = [name for name in LATENT_ATTENTION if values.get(name) is None]
    if missing:
        return [*problems, f"latent attention ({', '.join(given)}) needs {', '.join(missing)} too; add it."]
    return problems + _latent_attention_problems(values)


def _latent_attention_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    nope, rope, head_dim = (values[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "head_dim"))
    if _positive(rope) and rope % 2:
        problems.append(f"qk_rope_head_dim is {rope}; RoPE turns pairs, so give an even number.")
    if _positive(nope) and _positive(rope) and head_dim != nope + rope:
        problems.append(
            f"head_dim is {shown(head_dim)}, not the sum of qk_nope_head_dim {nope} and qk_rope_head_dim {rope}; "
            f"set it to {nope + rope}."
        )
    heads, key_value_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads != key_value_heads:
        problems.append(
            f"latent attention has a key and value for each of its num_attention_heads {shown(heads)}; set "
            f"num_key_value_heads to it, not {shown(key_value_heads)}."
        )
    unfit = {"num_latent_tokens": 0, "qk_norm": None, "partial_rotary_factor": 1.0}
    for name, neutral in unfit.items():
        if values.get(name, neutral) != neutral:
            problems.append(f"{name} is {shown(values[name])}, which latent attention has no place for; leave it out.")
    return problems


def _rope_scaling_problems(scaling: Any) -> list[str]:
    if not isinstance(scaling, dict):
        return []
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        return [f"rope_scaling: rope_type is {shown(kind)}; use one of {', '.join(ROPE_SCALINGS)}."]
    missing = ROPE_SCALINGS[kind] - scaling.keys()
    problems = [f'rope_scaling: "{kind}" needs {", ".join(sorted(missing))} too; add it.'] if missing else []
    for key, value in scaling.items():
        if key not in ROPE_SCALING_KEYS:
            problems.append(unknown_key("rope_scaling", key, ROPE_SCALING_KEYS))
        elif key != "rope_type" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            problems.append(f"rope_scaling: {key} is {shown(value)}; give a number above 0.")
    return problems
