"""config.json of transformers' classes to ModelConfig, and back, by the table.

A model fits a class if what is written for it and read again computes the same.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megamoe.config.model import ModelConfig, load_preset, preset_names, validate
from megamoe.formats.architectures import ARCHITECTURES, IGNORED, REQUIRED, Architecture, Key
from megamoe.utils.errors import Problems, UserError, shown
from megamoe.utils.json_files import read_json

OWN = "MegaMoeForCausalLM"  # of the export that carries its own code
ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
# Fields that only training reads.
TRAINING_ONLY = {
    "document_attention",
    "mtp_loss_coef",
    "output_z_loss_coef",
    "router_aux_loss_coef",
    "router_aux_loss_type",
    "router_bias_rate",
    "router_bias_rule",
    "router_load_decay",
    "router_z_loss_coef",
}
# With those that code of inference has a place for: fields that do not decide what a model computes.
TRAINING = TRAINING_ONLY | {
    "expert_dropout",
    "initializer_range",
    "num_nextn_predict_layers",
    "router_bias",
    "router_jitter_noise",
}


def find_preset(name: str) -> ModelConfig:
    """The preset of a name, of the path of its JSON file, or of a Hugging Face directory. Raises UserError."""
    if name not in preset_names() and Path(name).is_dir():
        return preset_of(Path(name))
    return load_preset(name)


def preset_of(directory: Path) -> ModelConfig:
    """The model in a Hugging Face directory: one of the table's, or one that megamoe exported. Raises UserError."""
    values = read_json(directory / "config.json")
    if values.get("architectures") == [OWN]:
        return _read_own(values, str(directory / "config.json"))
    return read_directory(directory)[1]


def read_directory(directory: Path) -> tuple[Architecture, ModelConfig]:
    """Architecture and model of a directory of a class in the table. Raises UserError with all problems."""
    path = directory / "config.json"
    name, values = class_of(path, ARCHITECTURES, " (megamoe upcycle makes one of a dense Llama or Qwen3)")
    return ARCHITECTURES[name], read_config(ARCHITECTURES[name], values, str(path))


def class_of(path: Path, known: Collection[str], hint: str = "") -> tuple[str, dict[str, Any]]:
    """The class of transformers that a config.json names, and its values. Raises UserError unless it is one of the
    known, with weights that are not quantised."""
    values = read_json(path)
    names = values.get("architectures")
    if not isinstance(names, list) or names not in [[name] for name in known]:
        raise UserError(
            f"{path}: architectures is {shown(names)}, which megamoe does not read; give a directory of "
            f"{', '.join(known)}{hint}."
        )
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{path}: quantization_config says that the weights are quantised; give the directory of the unquantised "
            "ones."
        )
    return names[0], values


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(architecture: Architecture, values: dict[str, Any], where: str) -> ModelConfig:
    """The model of a config.json. Raises UserError for keys that are unknown, missing, or have a value that the class
    or megamoe has no place for."""
    missing = [name for name, key in architecture.keys.items() if _value_of(name, key, values) is REQUIRED]
    Problems(
        [
            *_unknown_keys(architecture, values, where),
            *_unfit_keys(architecture, values, where),
            *(f'{where}: "{name}" is missing; add it.' for name in missing),
        ]
    ).refuse()
    return validate(ModelConfig, _fields(architecture, values), where)


def _unknown_keys(architecture: Architecture, values: dict[str, Any], where: str) -> list[str]:
    keys = architecture.keys
    known = {*keys, *architecture.stated, *architecture.only, *architecture.ignored, *IGNORED, *ROPE}
    known.add("quantization_config")
    known |= {name for key in keys.values() for name in (key.alias, key.switch) if name}
    known |= {architecture.rotary} if architecture.rotary else set()
    return [
        f"{where}: {shown(key)} is no key that megamoe knows of {architecture.name}; remove it if the model is "
        "the same without it."
        for key in values
        if key not in known
    ]


def _unfit_keys(architecture: Architecture, values: dict[str, Any], where: str) -> list[str]:
    allowed = {**architecture.only, **{key: (value,) for key, value in architecture.stated.items()}}
    rope = _rope_values(values)
    checked = values | {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    problems = rope_problems(values, where) + [
        f"{where}: {key} is {shown(checked[key])}, but megamoe reads {architecture.name} with "
        f"{' or '.join(map(shown, allowed[key]))} alone."
        for key in allowed.keys() & checked.keys()
        if not _is_one_of(checked[key], allowed[key])
    ]
    for name, key in architecture.keys.items():
        value = _value_of(name, key, values)
        if key.least is not None and value is not REQUIRED and _is_below(value, key.least):
            problems.append(f"{where}: {name} is {shown(value)}; {architecture.name} needs {key.least} or more.")
        if key.values is not None and not any(value is one for one in key.values):
            problems.append(f"{where}: {name} is {shown(value)}; use {' or '.join(map(shown, key.values))}.")
        if key.alias in values and values.get(name, values[key.alias]) != values[key.alias]:
            other = f"{key.alias}, which is the same, {shown(values[key.alias])}"
            problems.append(f"{where}: {name} is {shown(value)} and {other}; keep one.")
    return sorted(problems)


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return all(item in allowed for item in value) if isinstance(value, list) else value in allowed


def _is_below(value: Any, least: int) -> bool:
    return value is None or (isinstance(value, (int, float)) and value < least)


def _value_of(name: str, key: Key, values: dict[str, Any]) -> Any:
    if key.switch and not values.get(key.switch, False):
        return None
    value = values.get(name, values.get(key.alias, key.default) if key.alias else key.default)
    return () if value is None and key.default == () else value  # null is an empty list too


def _fields(architecture: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig, unchecked."""
    fields: dict[str, Any] = dict(architecture.implied)
    for name, key in architecture.keys.items():
        value = _value_of(name, key, values)
        value = key.values[value] if key.values else value
        fields |= dict.fromkeys((key.field, *key.also), list(value) if isinstance(value, tuple) else value)
    heads = fields["num_attention_heads"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if "kv_lora_rank" in fields:
        parts = (fields[part] for part in ("qk_nope_head_dim", "qk_rope_head_dim"))
        fields["head_dim"] = sum(part for part in parts if _is_size(part))
    elif fields.get("head_dim") is None and _is_size(fields["hidden_size"]) and _is_size(heads):
        fields["head_dim"] = fields["hidden_size"] // heads
    return fields | _rope_fields(architecture, values, fields)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def rope_problems(values: dict[str, Any], where: str) -> list[str]:
    """What a config.json has in place of an object, each in a sentence."""
    return [
        f"{where}: {key} is {shown(values[key])}, but megamoe reads an object with a rope_type there, or null."
        for key in ("rope_scaling", "rope_parameters")
        if not isinstance(values.get(key), (dict, type(None)))
    ]


def _rope_values(values: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, older versions and published files rope_scaling."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}


def _rope_fields(architecture: Architecture, values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    rope = _rope_values(values)
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    theta = rope.pop("rope_theta", values.get("rope_theta", architecture.rope_theta))
    factor = rope.pop("partial_rotary_factor", values.get("partial_rotary_factor"))
    if factor is None and architecture.rotary == "rotary_dim" and values.get("rotary_dim") is not None:
        rotated, of_head = values["rotary_dim"], fields["head_dim"]
        factor = rotated / of_head if _is_size(rotated) and _is_size(of_head) else rotated
    if kind in ("yarn", "llama3"):
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": kind, **rope} if kind != "default" or rope else None,
        "partial_rotary_factor": architecture.rotary_default if factor is None else factor,
    }


def _read_own(values: dict[str, Any], where: str) -> ModelConfig:
    """Of the export that carries its own code: config.json has the fields themselves. What only training needs has its
    default."""
    Problems(rope_problems(values, where)).refuse()
    fields = {name: values[name] for name in ModelConfig.model_fields if name in values}
    rope = _rope_values(values)
    fields["partial_rotary_factor"] = rope.pop("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    fields["rope_theta"] = rope.pop("rope_theta", 10_000.0)
    fields["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return validate(ModelConfig, fields, where)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_config(architecture: Architecture, config: ModelConfig, keep_mtp: bool = False) -> dict[str, Any]:
    """config.json of a model that fits the class, in the form of published files, which every version of transformers
    and other servers read.

    Args:
        keep_mtp: the weights of multi-token prediction are written too.
    """
    facts = _facts(config)
    values: dict[str, Any] = {"architectures": [architecture.name], "model_type": architecture.model_type}
    for name, key in architecture.keys.items():
        value = facts[key.field]
        if key.values:
            value = next((one for one, field in key.values.items() if field == value), key.default)
        if key.switch:
            values[key.switch] = value is not None
        values[name] = value
    values |= {**architecture.stated, "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if architecture.rotary:
        values[architecture.rotary] = facts[architecture.rotary]
    if architecture.mtp:
        values["num_nextn_predict_layers"] = config.num_nextn_predict_layers if keep_mtp else 0
    return values


def _facts(config: ModelConfig) -> dict[str, Any]:
    """The fields as the classes have them, where there are several ways to say the same."""
    dense = [block for block in range(config.num_hidden_layers) if config.is_dense(block)]
    return config.model_dump() | {
        "moe_intermediate_size": config.expert_size,
        "first_k_dense_replace": config.leading_dense_blocks,
        "mlp_only_layers": dense,
        "sliding_window": config.window(0),
        "rotary_dim": config.rotary_dim,
    }


# --- which class ------------------------------------------------------------------------------------------------------


def nearest(config: ModelConfig) -> tuple[Architecture, list[str]]:
    """The class with the fewest fields that do not fit, and these fields; none where it computes the same."""
    found = [(one, misfits(one, config)) for one in ARCHITECTURES.values()]
    return min(found, key=lambda pair: len(pair[1]))


def misfits(architecture: Architecture, config: ModelConfig) -> list[str]:
    """Fields of the model that the class has no place for, by name."""
    written = write_config(architecture, config)
    again = ModelConfig.model_construct(**_fields(architecture, written))  # unchecked: it may be no model at all
    too_small = {
        key.field
        for name, key in architecture.keys.items()
        if key.least is not None and _is_below(written[name], key.least)
    }
    return sorted({*differences(config, again), *too_small})


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields by which the two do not compute the same from the same weights."""
    here, there = _meaning(one), _meaning(other)
    return sorted(name for name in here if here[name] != there[name])


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What decides the logits, the same for models that compute the same."""
    blocks = range(config.num_hidden_layers)
    dense = [block for block in blocks if config.is_dense(block)]
    windows = [config.window(block) for block in blocks]
    scaling = config.rope_scaling
    if scaling and scaling.get("rope_type") == "yarn":
        scaling = {"original_max_position_embeddings": config.max_position_embeddings, **scaling}
    values = config.model_dump(exclude=TRAINING | {"first_k_dense_replace"}) | {
        "intermediate_size": config.intermediate_size if dense else None,
        "moe_intermediate_size": config.expert_size,
        "mlp_only_layers": dense,
        "sliding_window": windows[0],
        "layer_types": windows if len(set(windows)) > 1 else None,
        "partial_rotary_factor": config.rotary_dim / max(config.head_dim, 1),
        "rope_scaling": scaling,
    }
    if config.n_group == config.topk_group:  # every group may be chosen from
        values |= {"n_group": 1, "topk_group": 1}
    return values
