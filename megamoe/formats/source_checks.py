"""Whether the weights in a source are those of a model."""

from __future__ import annotations

import math

import torch

from megamoe.config.model import ModelConfig
from megamoe.config.optimizers import MASTERS
from megamoe.formats.architectures import BIAS
from megamoe.formats.source import Source
from megamoe.model.costs import parameter_shapes
from megamoe.model.names import EMBEDDING, HEAD, MTP, expert_id, layer_id

PIECE = 2**24  # values that are compared at a time


def model_problems(source: Source, config: ModelConfig, where: str) -> list[str]:
    """What keeps the parameters in `source` from being those of a model of `config`, a sentence for each field, or for
    the first parameter that one of them lacks. Reads the head, where there is one that the model ties to the embedding.
    """
    problems = _size_problems(source, config, where)
    if config.tie_word_embeddings and not _is_tied(source):
        why = f"true: its {HEAD} is not the embedding"
        problems["tie_word_embeddings"] = _other(where, "tie_word_embeddings", "false", why)
    if not config.router_bias and any(bias.any() for name, bias in source.buffers.items() if _is_bias(name)):
        problems["router_bias"] = (
            f"{where} has a balancing bias that is not zero, but router_bias is false; set it to true."
        )
    if not problems:
        held, expected = source.shapes.keys(), parameter_shapes(config).keys()
        lacking = [f"lacks {name}" for name in sorted(expected - held)]
        beyond = [f"has, beyond the model, {name}" for name in sorted(held - expected) if _is_needed(name, config)]
        for what in (lacking + beyond)[:1]:
            problems[what] = f"{where} {what}; use the preset that it was made with."
    return list(problems.values())


def _is_bias(name: str) -> bool:
    return name.endswith(BIAS) and not name.startswith(MTP)


def _is_needed(name: str, config: ModelConfig) -> bool:
    """Whether a model with this parameter differs from the same without."""
    return not name.startswith(MTP) and not (config.tie_word_embeddings and name == HEAD)


def _size_problems(source: Source, config: ModelConfig, where: str) -> dict[str, str]:
    """Sentences by field, of numbers of layers and experts; where these fit, of the first other shape."""
    problems: dict[str, str] = {}
    for field, id_of in (("num_hidden_layers", layer_id), ("num_local_experts", expert_id)):
        ids = {id_of(name) for name in source.shapes} - {None}
        if len(ids) != getattr(config, field):
            problems[field] = _other(where, field, len(ids), getattr(config, field))
    for name, shape in parameter_shapes(config).items():
        found = source.shapes.get(name, shape)
        if found != shape and not problems:
            problems["shape"] = f"{where}: {name} has the shape {found}, not {shape}; use the same preset."
    return problems


def _other(where: str, field: str, made: object, wanted: object) -> str:
    return f"{where} was made with {field} {made}, not {wanted}; use the same preset."


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
