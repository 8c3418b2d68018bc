"""What does not fit between the fields of a model's configuration, one sentence each.

A field that is wrong itself has a sentence already, and what needs it is passed over, so that all problems are found at
once.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def rotated_dimensions(head_dim: int, factor: float) -> int:
    """Dimensions of a head that a partial_rotary_factor rotates: their product, whole. A factor that is a quotient of
    two sizes may be a rounding error below it."""
    return int(head_dim * factor + 1e-6)


def _heads(m: Any) -> Iterator[str]:
    heads, key_value_heads = m.num_attention_heads, m.num_key_value_heads
    if heads % key_value_heads:
        yield (
            f"num_attention_heads is {heads}, not a multiple of num_key_value_heads {key_value_heads}; "
            f"set that to a divisor of {heads}."
        )


def _sizes(m: Any) -> Iterator[str]:
    layers, experts = m.num_hidden_layers, m.num_local_experts
    if layers * experts > MAX_EXPERTS:
        yield (
            f"num_hidden_layers {layers} x num_local_experts {experts} is {layers * experts:,} experts, above the "
            f"limit of {MAX_EXPERTS:,}; lower one of them."
        )


def _dense_blocks(m: Any) -> Iterator[str]:
    layers, first, listed = m.num_hidden_layers, m.first_k_dense_replace, m.mlp_only_layers
    if outside := sorted(block for block in listed if not 0 <= block < layers):
        yield f"mlp_only_layers has {outside[0]}, but the {layers} blocks are 0 to {layers - 1}; remove it."
    if {*range(first), *listed} >= set(range(layers)):
        yield (
            f"all {layers} blocks are dense (first_k_dense_replace {first}, mlp_only_layers {listed}); leave one with "
            "experts."
        )
    if m.shared_expert_gate and not m.n_shared_experts:
        yield "shared_expert_gate is true without shared experts; set n_shared_experts, or leave it out."


def _layer_types(m: Any) -> Iterator[str]:
    types, window = m.layer_types, m.sliding_window
    if m.num_latent_tokens and window:
        yield (
            f"num_latent_tokens is {m.num_latent_tokens}, which sliding_window {window} has no place for; leave one of "
            "them out."
        )
    if types is None:
        return
    if "sliding_attention" in types and window is None:
        yield "layer_types has sliding layers without a sliding_window; give its number of positions."
    if "sliding_attention" not in types and window:
        yield (
            f"sliding_window is {window}, but layer_types has no sliding layer; leave it out, or make some of them "
            "sliding_attention."
        )
    if len(types) != m.num_hidden_layers:
        yield f"layer_types has {len(types)} entries for {m.num_hidden_layers} blocks; give one for each."


def _top_k(m: Any) -> Iterator[str]:
    if m.num_experts_per_tok > m.num_local_experts:
        top_k, experts = m.num_experts_per_tok, m.num_local_experts
        yield f"num_experts_per_tok is {top_k}, above num_local_experts {experts}; lower it."


def _groups(m: Any) -> Iterator[str]:
    experts, groups, chosen = m.num_local_experts, m.n_group, m.topk_group
    if chosen > groups:
        yield f"topk_group is {chosen}, above n_group {groups}; lower it."
    if experts % groups or (groups > 1 and experts // groups < 2):
        yield (
            f"n_group {groups} does not divide num_local_experts {experts} into groups of two or more; choose another."
        )
    elif chosen <= groups and experts >= m.num_experts_per_tok > chosen * experts // groups:
        yield (
            f"num_experts_per_tok is {m.num_experts_per_tok}, above the {chosen * experts // groups} experts of "
            f"topk_group {chosen} groups; raise topk_group."
        )
    if chosen < groups and m.router_bias_rule == "quantile":
        yield (
            f'router_bias_rule "quantile" does not know groups, and topk_group is {chosen} of n_group {groups}; use '
            '"sign" or "proportional".'
        )


def _rotated(m: Any) -> int:
    return m.qk_rope_head_dim or rotated_dimensions(m.head_dim, m.partial_rotary_factor)


def _rotation(m: Any) -> Iterator[str]:
    rotated = _rotated(m)
    if m.partial_rotary_factor != 1 and m.qk_rope_head_dim is None and (rotated < 2 or rotated % 2):
        yield (
            f"partial_rotary_factor {m.partial_rotary_factor} rotates {rotated} of the {m.head_dim} dimensions of a "
            "head; RoPE turns pairs, so choose an even number of 2 or more."
        )


def _latent_attention(m: Any) -> Iterator[str]:
    given = [name for name in (*LATENT_ATTENTION, "q_lora_rank") if getattr(m, name) is not None]
    missing = [name for name in LATENT_ATTENTION if getattr(m, name) is None]
    if not given:
        return
    if missing:
        yield f"latent attention ({', '.join(given)}) needs {', '.join(missing)} too; add it."
        return
    nope, rope = m.qk_nope_head_dim, m.qk_rope_head_dim
    if rope % 2:
        yield f"qk_rope_head_dim is {rope}; RoPE turns pairs, so give an even number."
    for name, none in (("num_latent_tokens", 0), ("qk_norm", None), ("partial_rotary_factor", 1)):
        if getattr(m, name) != none:
            yield f"{name} is {shown(getattr(m, name))}, which latent attention has no place for; leave it out."
    if m.num_attention_heads != m.num_key_value_heads:
        yield (
            f"latent attention has a key and value for each of its num_attention_heads {m.num_attention_heads}; set "
            f"num_key_value_heads to it, not {m.num_key_value_heads}."
        )
    if m.head_dim != nope + rope:
        yield (
            f"head_dim is {m.head_dim}, not the sum of qk_nope_head_dim {nope} and qk_rope_head_dim {rope}; set it to "
            f"{nope + rope}."
        )


def _scaling(m: Any) -> Iterator[str]:
    scaling = m.rope_scaling
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        yield f"rope_scaling: rope_type is {shown(kind)}; use one of {', '.join(ROPE_SCALINGS)}."
        return
    needed, others = ROPE_SCALINGS[kind]
    if missing := needed - scaling.keys():
        yield f'rope_scaling: "{kind}" needs {", ".join(sorted(missing))} too; add it.'
    of_any_kind = set[str]().union(*(one | more for one, more in ROPE_SCALINGS.values()))
    for key, value in scaling.items():
        if key == "rope_type":
            continue
        if key not in of_any_kind:
            yield unknown_key("rope_scaling", key, needed | others | {"rope_type"})
        elif key not in needed | others:
            yield f'rope_scaling: {key} is {shown(value)}, which "{kind}" does not read; leave it out.'
        elif not _is_positive(value):
            yield f"rope_scaling: {key} is {shown(value)}; give a number above 0."
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if kind == "llama3" and _is_positive(low) and _is_positive(high) and low >= high:
        yield f"rope_scaling: low_freq_factor is {low}, not below high_freq_factor {high}; lower it."
    if kind == "dynamic" and _rotated(m) == 2:
        yield (
            'rope_scaling: "dynamic" needs 4 or more rotated dimensions of a head, not 2; raise them, or use "linear".'
        )


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


RULES = (_heads, _sizes, _dense_blocks, _layer_types, _top_k, _groups, _rotation, _latent_attention, _scaling)
