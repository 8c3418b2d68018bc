"""Whether the weights in a source are those of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megamoe.config.model import ModelConfig
from megamoe.config.optimizers import MASTERS
from megamoe.formats.architectures import BIAS
from megamoe.formats.source import Source
from megamoe.model.costs import parameter_shapes, size_fields
from megamoe.model.names import EMBEDDING, HEAD, MTP, expert_id, has_gates, layer_id

OPTIONAL_PARTS = {  # the ends of names that a field adds
    "num_latent_tokens": (".latents",),
    "qk_norm": (".q_norm.weight",),
    "attention_bias": (".v_proj.bias", ".kv_a_proj_with_mqa.bias"),
    "attention_out_bias": (".o_proj.bias",),
    "kv_lora_rank": (".kv_b_proj.weight",),
    "q_lora_rank": (".q_b_proj.weight",),
    "n_shared_experts": (".shared_mlp.up_proj.weight",),
    "shared_expert_gate": (".shared_gate.weight",),
}
DENSE = ".mlp.up_proj.weight"  # the end of a name that each dense block has
PIECE = 2**24  # values that are compared at a time


def model_problems(source: Source, config: ModelConfig, where: str) -> list[str]:
    """What keeps the parameters in `source` from being those of a model of `config`, a sentence for each field. Reads
    the head, where there is one that the model ties to the embedding."""
    problems = _size_problems(source, config, where) | _part_problems(source, config, where)
    if not problems:
        expected = parameter_shapes(config)
        beyond = {name for name in source.shapes.keys() - expected.keys() if not name.startswith(MTP)}  # not needed
        if config.tie_word_embeddings:
            beyond.discard(HEAD)
        for name in sorted([*(expected.keys() - source.shapes.keys()), *beyond])[:1]:
            what = "lacks" if name in expected else "has, beyond the model,"
            problems[name] = f"{where} {what} {name}; it is of another architecture."
    return list(problems.values())


def _size_problems(source: Source, config: ModelConfig, where: str) -> dict[str, str]:
    """Sentences by field, of sizes and of numbers of layers and experts."""
    problems: dict[str, str] = {}
    for name, shape in parameter_shapes(config).items():
        found = source.shapes.get(name)
        if found is None:
            continue
        if len(found) != len(shape):
            problems.setdefault(name, f"{where}: {name} has the shape {found}, not {shape}.")
            continue
        if name.endswith(("q_norm.weight", "k_norm.weight")) and found != shape:
            problems.setdefault(
                "qk_norm",
                f"{where}: {name} has {found[0]} numbers, not {shape[0]}: another qk_norm, or other heads; "
                "use the same preset.",
            )
            continue
        for dimension, (size, other) in enumerate(zip(shape, found, strict=True)):
            if size != other:
                field = size_fields(config, name, dimension)
                problems.setdefault(field, _other(where, field, other, size))
    for field, id_of in (("num_hidden_layers", layer_id), ("num_local_experts", expert_id)):
        ids = {id_of(name) for name in source.shapes} - {None}
        if len(ids) != getattr(config, field):
            problems.setdefault(field, _other(where, field, len(ids), getattr(config, field)))
    return problems


def _part_problems(source: Source, config: ModelConfig, where: str) -> dict[str, str]:
    """Sentences by field, of what a model has or has not."""
    problems: dict[str, str] = {}
    expected = parameter_shapes(config)
    if has_gates(source.shapes) != config.gated_mlp:
        made, expects = ("true", "false") if has_gates(source.shapes) else ("false", "true")
        problems["gated_mlp"] = _other(where, "gated_mlp", made, expects)
    if config.tie_word_embeddings and not _is_tied(source):
        why = f"true: its {HEAD} is not the embedding"
        problems["tie_word_embeddings"] = _other(where, "tie_word_embeddings", "false", why)
    if not config.tie_word_embeddings and HEAD not in source.shapes:
        problems["tie_word_embeddings"] = _other(where, "tie_word_embeddings", "true", "false")
    for field, ends in OPTIONAL_PARTS.items():
        is_there, is_expected = (any(name.endswith(ends) for name in names) for names in (source.shapes, expected))
        if is_there != is_expected:
            words = ("with", "without") if is_there else ("without", "with")
            problems[field] = f"{where} was made {words[0]} {field}, not {words[1]} it; use the same preset."
    if config.num_nextn_predict_layers and not any(name.startswith(MTP) for name in source.shapes):
        problems["num_nextn_predict_layers"] = (
            f"{where} was made without num_nextn_predict_layers, not with it; use the same preset."
        )
    held, wanted = _dense_blocks(source.shapes), _dense_blocks(expected)
    if held != wanted and len({layer_id(name) for name in source.shapes} - {None}) == config.num_hidden_layers:
        problems["first_k_dense_replace"] = (
            f"{where} was made with the dense blocks {held}, not {wanted} (first_k_dense_replace, mlp_only_layers); "
            "use the same preset."
        )
    return problems | _bias_problems(source, config, where)


def _other(where: str, field: str, made: object, wanted: object) -> str:
    return f"{where} was made with {field} {made}, not {wanted}; use the same preset."


def _dense_blocks(names: Iterable[str]) -> list[int]:
    return sorted(int(layer_id(name) or 0) for name in names if name.endswith(DENSE))


def _is_tied(source: Source) -> bool:
    """Whether the head is the embedding, by its values where the source has both."""
    shape = source.shapes.get(HEAD)
    if shape is None or shape != source.shapes.get(EMBEDDING):
        return shape is None
    count = math.prod(shape)
    return all(
        torch.equal(*(source.read(name, MASTERS, start, min(PIECE, count - start)) for name in (HEAD, EMBEDDING)))
        for start in range(0, count, PIECE)
    )


def _bias_problems(source: Source, config: ModelConfig, where: str) -> dict[str, str]:
    biased = any(
        name.endswith(BIAS) and not name.startswith(MTP) and bool(bias.any()) for name, bias in source.buffers.items()
    )
    if config.router_bias or not biased:
        return {}
    return {"router_bias": f"{where} has a balancing bias that is not zero, but router_bias is false; set it to true."}
