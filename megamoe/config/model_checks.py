"""What does not fit between the fields of a model's configuration, one sentence each.

Every check passes over fields that are wrong themselves, which have a sentence already, so that all problems are found
at once.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from megamoe.utils.errors import shown, unknown_key

# Limits far above any real model; they keep a slip of the pen from filling the memory.
MAX_LAYERS = 10_000
MAX_EXPERTS = 2**18  # of all layers together
MAX_SIZE = 2**24  # of a dimension

YARN = {
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
}  # fmt: skip
ROPE_SCALINGS = {  # what each kind needs, and what it reads besides
    "linear": ({"factor"}, set[str]()),
    "dynamic": ({"factor"}, set[str]()),
    "yarn": ({"factor"}, YARN),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set[str]()),
}
LATENT_ATTENTION = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # all of them or none


def field_problems(values: dict[str, Any]) -> list[str]:
    """Of a model's fields by name, checked or not."""
    return [
        *_size_problems(values),
        *_block_problems(values),
        *_router_problems(values),
        *_attention_problems(values),
        *_rope_scaling_problems(values.get("rope_scaling"), _rotated(values)),
    ]


def rotated_dimensions(head_dim: int, factor: float) -> int:
    """Dimensions of a head that a partial_rotary_factor rotates: their product, whole. A factor that is a quotient of
    two sizes may be a rounding error below it."""
    return int(head_dim * factor + 1e-6)


def _positive(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _rotated(values: dict[str, Any]) -> int | None:
    """Dimensions of a head that are rotated; None where the fields that say it are wrong."""
    rope, head_dim = values.get("qk_rope_head_dim"), values.get("head_dim")
    factor = values.get("partial_rotary_factor", 1.0)
    if rope is not None:
        return rope if _positive(rope) else None
    return rotated_dimensions(head_dim, factor) if _positive(head_dim) and _number(factor) and factor <= 1 else None


def _size_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    heads, key_value_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if _positive(heads) and _positive(key_value_heads) and heads % key_value_heads:
        problems.append(
            f"num_attention_heads is {heads}, not a multiple of num_key_value_heads {key_value_heads}; "
            f"set that to a divisor of {heads}."
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
    if isinstance(types, list) and "sliding_attention" not in types and _positive(values.get("sliding_window")):
        problems.append(
            f"sliding_window is {values['sliding_window']}, but layer_types has no sliding layer; leave it out, or "
            "make some of them sliding_attention."
        )
    if values.get("shared_expert_gate") is True and values.get("n_shared_experts", 0) == 0:
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
    if chosen < groups and values.get("router_bias_rule") == "quantile":
        problems.append(
            f'router_bias_rule "quantile" does not know groups, and topk_group is {chosen} of n_group {groups}; use '
            '"sign" or "proportional".'
        )
    if chosen > groups:
        problems.append(f"topk_group is {chosen}, above n_group {groups}; lower it.")
    if experts % groups or (groups > 1 and experts // groups < 2):
        problems.append(
            f"n_group {groups} does not divide num_local_experts {experts} into groups of two or more; choose another."
        )
    elif chosen <= groups and _positive(top_k) and experts >= top_k > chosen * experts // groups:
        problems.append(
            f"num_experts_per_tok is {top_k}, above the {chosen * experts // groups} experts of topk_group {chosen} "
            f"groups; raise topk_group."
        )
    return problems


def _attention_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    factor, rotated = values.get("partial_rotary_factor", 1.0), _rotated(values)
    is_partial = factor != 1 and values.get("qk_rope_head_dim") is None
    if is_partial and rotated is not None and (rotated < 2 or rotated % 2):
        problems.append(
            f"partial_rotary_factor {factor} rotates {rotated} of the {values['head_dim']} dimensions of a head; RoPE "
            "turns pairs, so choose an even number of 2 or more."
        )
    if _positive(values.get("num_latent_tokens")) and _positive(values.get("sliding_window")):
        problems.append(
            f"num_latent_tokens is {values['num_latent_tokens']}, which sliding_window {values['sliding_window']} has "
            "no place for; leave one of them out."
        )
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
    if _positive(nope) and _positive(rope) and _positive(head_dim) and head_dim != nope + rope:
        problems.append(
            f"head_dim is {head_dim}, not the sum of qk_nope_head_dim {nope} and qk_rope_head_dim {rope}; set it to "
            f"{nope + rope}."
        )
    heads, key_value_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if _positive(heads) and _positive(key_value_heads) and heads != key_value_heads:
        problems.append(
            f"latent attention has a key and value for each of its num_attention_heads {heads}; set "
            f"num_key_value_heads to it, not {key_value_heads}."
        )
    factor = values.get("partial_rotary_factor", 1.0)
    unfit = {
        "num_latent_tokens": _positive(values.get("num_latent_tokens")),
        "qk_norm": values.get("qk_norm") in ("head", "full"),
        "partial_rotary_factor": _number(factor) and factor < 1,
    }
    problems += [
        f"{name} is {shown(values[name])}, which latent attention has no place for; leave it out."
        for name, is_given in unfit.items()
        if is_given
    ]
    return problems


def _rope_scaling_problems(scaling: Any, rotated: int | None) -> list[str]:
    if not isinstance(scaling, dict):
        return []
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        return [f"rope_scaling: rope_type is {shown(kind)}; use one of {', '.join(ROPE_SCALINGS)}."]
    needed, others = ROPE_SCALINGS[kind]
    missing = needed - scaling.keys()
    problems = [f'rope_scaling: "{kind}" needs {", ".join(sorted(missing))} too; add it.'] if missing else []
    of_any_kind = {"rope_type"}.union(*(one | more for one, more in ROPE_SCALINGS.values()))
    for key, value in scaling.items():
        if key not in of_any_kind:
            problems.append(unknown_key("rope_scaling", key, needed | others | {"rope_type"}))
        elif key == "rope_type":
            continue
        elif key not in needed | others:
            problems.append(f'rope_scaling: {key} is {shown(value)}, which "{kind}" does not read; leave it out.')
        elif not _number(value):
            problems.append(f"rope_scaling: {key} is {shown(value)}; give a number above 0.")
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if kind == "llama3" and _number(low) and _number(high) and low >= high:
        problems.append(f"rope_scaling: low_freq_factor is {low}, not below high_freq_factor {high}; lower it.")
    if kind == "dynamic" and rotated == 2:
        problems.append(
            'rope_scaling: "dynamic" needs 4 or more rotated dimensions of a head, not 2; raise them, or use "linear".'
        )
    return problems
