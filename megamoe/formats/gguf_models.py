"""The architectures of llama.cpp that a model can be written for, and what each takes of its configuration.

llama.cpp builds one graph per architecture; where a graph leaves no choice, `takes` says what the field must be. What
only training reads (losses, rates, dropout) may have any value.
Source: src/models/*.cpp and src/llama-model.cpp of llama.cpp, as in the package xllamacpp 2026.10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.config.model import MAX_SIZE, ModelConfig
from megamoe.model.rope import rope_frequencies
from megamoe.utils.errors import UserError, shown

SOME = range(1, MAX_SIZE + 1)


@dataclass(frozen=True)
class GgufArchitecture:
    """One of llama.cpp's graphs."""

    name: str
    takes: dict[str, range | tuple[Any, ...]]
    """The values that a field may have."""
    interleaved: bool = False
    """RoPE turns neighbouring pairs, not halves."""
    selection_bias: bool = False
    """Has a place for the balancing bias."""
    needs_bias: bool = False
    """Refuses a file without one."""
    needs_head: bool = False
    """Refuses a file without the head, even where it is the embedding."""
    dense_blocks: bool = False
    """Its first blocks can be dense."""
    scaled_frequencies: bool = False
    """Reads a factor for each rotary frequency, which holds "llama3" scaling."""
    check: Callable[[ModelConfig], list[str]] = lambda config: []
    """What further does not fit."""


def _olmoe(config: ModelConfig) -> list[str]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    equal = (
        ("num_attention_heads x head_dim", heads * config.head_dim, "hidden_size", hidden),
        ("num_key_value_heads", config.num_key_value_heads, "num_attention_heads", heads),
    )
    return [f"{one} is {value}, but olmoe takes {two} {other}" for one, value, two, other in equal if value != other]


def _deepseek2(config: ModelConfig) -> list[str]:
    layers = config.num_hidden_layers
    uncompressed = layers in (26, 27) or (layers == 48 and config.vocab_size == 128_256)  # as in DeepSeek-V2-Lite
    if config.q_lora_rank and uncompressed:
        return [f"q_lora_rank is {config.q_lora_rank}, but deepseek2 of {layers} layers takes null"]
    return []


EVERY: dict[str, range | tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "gated_mlp": (True,),
    "num_latent_tokens": (0,),
    "shared_expert_gate": (False,),
    "num_local_experts": range(1, 1025),  # LLAMA_MAX_EXPERTS
    "num_hidden_layers": range(1, 513),  # LLAMA_MAX_LAYERS
}
HEADS = EVERY | {"kv_lora_rank": (None,)}
PLAIN = HEADS | {"n_shared_experts": (0,), "routed_scaling_factor": (1.0,)}
SOFTMAX = PLAIN | {"router_score": ("softmax",), "partial_rotary_factor": (1.0,)}
NO_OUT_BIAS = {"attention_out_bias": (False,)}

GGUF_ARCHITECTURES = (
    GgufArchitecture(
        "llama",
        SOFTMAX | {"norm_topk_prob": (True,), "qk_norm": (None,)},
        interleaved=True,
        scaled_frequencies=True,
    ),
    GgufArchitecture(
        "olmoe",
        SOFTMAX | NO_OUT_BIAS | {"norm_topk_prob": (False,), "qk_norm": ("full",)},
        needs_head=True,
        check=_olmoe,
    ),
    GgufArchitecture("qwen3moe", SOFTMAX | NO_OUT_BIAS | {"norm_topk_prob": (True,), "qk_norm": ("head",)}),
    GgufArchitecture(
        "minimax-m2",
        PLAIN | NO_OUT_BIAS | {"norm_topk_prob": (True,), "qk_norm": ("full",)},
        selection_bias=True,
        needs_bias=True,
        needs_head=True,
    ),
    GgufArchitecture(
        "glm4moe",
        HEADS | NO_OUT_BIAS | {"qk_norm": (None, "head"), "n_shared_experts": SOME},
        selection_bias=True,
        needs_bias=True,
        dense_blocks=True,
    ),
    GgufArchitecture(
        "deepseek2",
        EVERY | NO_OUT_BIAS | {"kv_lora_rank": SOME, "n_shared_experts": SOME, "attention_bias": (False,)},
        interleaved=True,
        selection_bias=True,
        dense_blocks=True,
        check=_deepseek2,
    ),
)


def architecture_of(config: ModelConfig, biased: bool) -> GgufArchitecture:
    """The first architecture that computes what a model of `config` does. Raises UserError, a sentence for each field
    that the nearest one cannot hold.

    Args:
        biased: whether the balancing bias of some layer is not zero.
    """
    found = [(problems(config, architecture, biased), architecture) for architecture in GGUF_ARCHITECTURES]
    misfits, nearest = min(found, key=lambda pair: len(pair[0]))
    if misfits:
        raise UserError(
            *(
                f"{misfit}; no architecture of llama.cpp is nearer, so give a folder, for transformers, instead."
                for misfit in misfits
            )
        )
    return nearest


def problems(config: ModelConfig, architecture: GgufArchitecture, biased: bool) -> list[str]:
    """What `architecture` cannot hold of a model, each in words."""
    name = architecture.name
    found = [
        f"{field} is {shown(getattr(config, field))}, but {name} takes {_choices(values)}"
        for field, values in architecture.takes.items()
        if getattr(config, field) not in values
    ]
    if biased and not architecture.selection_bias:
        found.append(f"the balancing bias (router_bias) is not zero, but {name} has none")
    checks = (architecture.check(config), _dense(config, architecture), _windows(config))
    between = [problem for problems in checks for problem in problems]
    return [*found, *between, *_rope(config, architecture)]


def _choices(values: range | tuple[Any, ...]) -> str:
    if isinstance(values, range):
        return "1 or more" if values is SOME else f"up to {values[-1]}"
    return " or ".join(map(shown, values))


def _dense(config: ModelConfig, architecture: GgufArchitecture) -> list[str]:
    dense = [block for block in range(config.num_hidden_layers) if config.is_dense(block)]
    if dense and not architecture.dense_blocks:
        return [f"block {dense[0]} is dense, but {architecture.name} has experts in all blocks"]
    if len(dense) > config.leading_dense_blocks:
        return [f"block {dense[-1]} is dense behind one with experts, but {architecture.name} begins with dense ones"]
    return []


def _windows(config: ModelConfig) -> list[str]:
    """A window that no position is outside of is none."""
    longest = config.max_position_embeddings
    windows = [config.window(block) or longest for block in range(config.num_hidden_layers)]
    if min(windows) >= longest:
        return []
    return [f"sliding_window is {min(windows)}, but llama.cpp's attention sees all {longest} positions"]


def _rope(config: ModelConfig, architecture: GgufArchitecture) -> list[str]:
    scaling, name = config.rope_scaling, architecture.name
    kind = scaling and scaling["rope_type"]
    if not scaling or kind == "linear" or (kind == "llama3" and architecture.scaled_frequencies):
        return []
    if kind != "yarn":
        return [f"rope_scaling is of the type {shown(kind)}, but {name} has no such"]
    found = [
        f"rope_scaling has {key} {scaling[key]}, but llama.cpp takes {fixed}"
        for key, fixed in (("beta_fast", 32), ("beta_slow", 1))
        if scaling.get(key, fixed) != fixed
    ]
    if scaling["factor"] < 1:
        found.append(f"rope_scaling has factor {scaling['factor']}, but llama.cpp takes 1 or more")
    if config.kv_lora_rank:
        if not scaling.get("mscale_all_dim") or scaling.get("mscale") != scaling["mscale_all_dim"]:
            found.append(f"rope_scaling has different mscale and mscale_all_dim, or none, but {name} takes equal ones")
        if scaling.get("attention_factor"):
            found.append(f"rope_scaling has attention_factor, but {name} does not read it")
    return found


def frequency_factors(config: ModelConfig) -> torch.Tensor:
    """What "llama3" scaling divides each rotary frequency by, (rotary_dim / 2,) fp32."""
    given = config.rope_theta, config.rope_scaling, config.max_position_embeddings, torch.ones(1)
    scaled, _ = rope_frequencies(config.rotary_dim, *given)
    plain, _ = rope_frequencies(config.rotary_dim, config.rope_theta, None, *given[2:])
    return (plain / scaled).squeeze(0)


def yarn_attention(config: ModelConfig) -> float:
    """The factor on cos and sin, relative to YaRN's own, which llama.cpp applies by itself."""
    scaling = config.rope_scaling or {}
    given = config.rope_theta, config.rope_scaling, config.max_position_embeddings, torch.ones(1)
    _, factor = rope_frequencies(config.rotary_dim, *given)
    return factor / (0.1 * math.log(scaling["factor"]) + 1)
