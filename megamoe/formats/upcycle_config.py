"""config.json of a dense model of transformers, and of the sparse one that `upcycle.py` makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe.formats.architectures import MIXTRAL, QWEN3_MOE, Architecture
from megamoe.formats.config_json import rope_problems
from megamoe.utils.errors import UserError, shown, unknown_key
from megamoe.utils.json_files import read_json

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Written in any case, since the sparse classes have other defaults than the dense ones.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_THETA = 10_000.0
IGNORED = (
    "architectures",
    "model_type",
    "transformers_version",
    "_name_or_path",
    "pretraining_tp",
    "torch_dtype",
    "dtype",
    "use_cache",
)


@dataclass(frozen=True)
class Pair:
    """A dense class of transformers, and the sparse one that it becomes."""

    sparse: Architecture
    stated: dict[str, Any]
    """Keys that make the sparse class compute what the dense one does."""
    only: dict[str, tuple[Any, ...]]
    """Keys of the dense class that must have one of these values, or be missing."""
    default_head_dim: int | None = None
    qk_norm: bool = False
    may_have_bias: bool = False
    """Both classes have biases in attention, by `attention_bias`."""
    ignored: tuple[str, ...] = field(default=())


PAIRS = {
    "LlamaForCausalLM": Pair(
        MIXTRAL,
        stated={"sliding_window": None},
        only={"attention_bias": (False,), "mlp_bias": (False,), "attention_dropout": (0.0,)},
    ),
    "Qwen3ForCausalLM": Pair(
        QWEN3_MOE,
        stated={
            **QWEN3_MOE.stated,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "sliding_window": None,
        },
        only={"use_sliding_window": (False,), "attention_dropout": (0.0,)},
        default_head_dim=128,
        qk_norm=True,
        may_have_bias=True,
        ignored=("sliding_window", "max_window_layers", "layer_types"),  # they say nothing without use_sliding_window
    ),
}


def read_dense(path: Path) -> tuple[Pair, dict[str, Any]]:
    """The pair of a dense model's config.json, and its keys with what they default to. Raises UserError with all that
    has no place in the sparse model."""
    values = read_json(path)
    names = values.get("architectures")
    pair = PAIRS.get(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else None
    if pair is None:
        raise UserError(f"{path}: architectures is {shown(names)}; give a directory of {' or '.join(PAIRS)}.")
    if values.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config says that the weights are quantised; give the unquantised ones.")
    problems = [
        f"{path}: {key} is {shown(values.get(key))}; give a whole number above 0."
        for key in (*REQUIRED, "num_key_value_heads", "head_dim")
        if (key in REQUIRED or values.get(key) is not None) and not _is_size(values.get(key))
    ]
    problems += [
        f"{path}: {key} is {shown(values[key])}, which {pair.sparse.name} has no place for; give a model with "
        f"{' or '.join(map(shown, allowed))}."
        for key, allowed in pair.only.items()
        if values.get(key, allowed[0]) not in allowed
    ]
    known = [*REQUIRED, *DEFAULTS, *TOKENS, *IGNORED, *pair.ignored, *pair.only, "num_key_value_heads", "head_dim"]
    known += ["rope_theta", "rope_scaling", "rope_parameters", *["attention_bias"] * pair.may_have_bias]
    known += ["quantization_config"]
    problems += [unknown_key(str(path), key, known) for key in values if key not in known]
    problems += rope_problems(values, str(path))
    if problems:
        raise UserError(*problems)
    heads = values["num_attention_heads"]
    head_dim = pair.default_head_dim or values["hidden_size"] // heads
    filled = {"num_key_value_heads": heads, "head_dim": head_dim}
    return pair, values | {key: values.get(key) or default for key, default in filled.items()}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _rope(values: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """RoPE's base, and the scaling with its kind; transformers 5 writes both as rope_parameters, others apart."""
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    theta = given.pop("rope_theta", None) or values.get("rope_theta") or ROPE_THETA
    kind = given.pop("type", "default")
    return theta, {"rope_type": given.pop("rope_type", kind), **given}


def sparse_config(pair: Pair, dense: dict[str, Any], num_experts: int, top_k: int, expert_size: int) -> dict[str, Any]:
    """config.json of the sparse model."""
    keys = {key.field: name for name, key in pair.sparse.keys.items()}
    theta, scaling = _rope(dense)
    copied = [*REQUIRED, *TOKENS, "num_key_value_heads", "head_dim", *["attention_bias"] * pair.may_have_bias]
    return {
        "architectures": [pair.sparse.name],
        "model_type": pair.sparse.model_type,
        **{key: dense[key] for key in copied if key in dense},
        **{key: dense.get(key, default) for key, default in DEFAULTS.items()},
        "rope_theta": theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        keys["num_local_experts"]: num_experts,
        "num_experts_per_tok": top_k,
        keys["moe_intermediate_size"]: expert_size,
        **pair.stated,
    }
