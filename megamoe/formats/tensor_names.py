"""Names of tensors in the files of transformers' classes, by the plain names, by the table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megamoe.config.model import ModelConfig
from megamoe.formats.architectures import BIAS, MTP_COPIES, ROUTER, STACKED, Architecture
from megamoe.model.costs import parameter_shapes
from megamoe.model.names import MTP, PLAIN_LAYER, split_expert

MTP_BLOCK = f"{MTP}block."


@dataclass(frozen=True)
class Place:
    """Where a file may hold a plain tensor: a stretch of one of its tensors."""

    tensor: str
    shape: tuple[int, ...]
    start: int = 0
    """In the flattened tensor."""


def plain_shapes(architecture: Architecture, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model that the class holds, the balancing biases included, under its plain name."""
    shapes = {
        name: shape for name, shape in parameter_shapes(config).items() if architecture.mtp or not name.startswith(MTP)
    }
    if architecture.has_bias:
        routers = [name for name in shapes if name.endswith(ROUTER)]
        shapes |= {name.removesuffix(ROUTER) + BIAS: shapes[name][:1] for name in routers}
    return shapes


def places(architecture: Architecture, config: ModelConfig) -> dict[str, list[Place]]:
    """Where files may hold each plain tensor; the first place is the one that is written."""
    return {
        name: list(_places(architecture, config, name, shape))
        for name, shape in plain_shapes(architecture, config).items()
    }


def _places(architecture: Architecture, config: ModelConfig, name: str, shape: tuple[int, ...]) -> Iterator[Place]:
    layer, rest = _split_layer(architecture, config, name)
    expert = split_expert(name)
    pattern = f"moe.experts.{{}}.{expert.parameter}" if expert else rest
    for found in architecture.tensors.get(pattern, (rest,)):
        yield Place(layer + (found.format(expert.expert) if expert else found), shape)
    if expert:
        stacked, number, parts = STACKED[expert.parameter]
        all_rows = (config.num_local_experts, parts * shape[0], *shape[1:])
        yield Place(layer + stacked, all_rows, (expert.expert * parts + number) * math.prod(shape))


def _split_layer(architecture: Architecture, config: ModelConfig, name: str) -> tuple[str, str]:
    """What stands before the name within a layer, in the files, and the plain name within it."""
    beyond = f"model.layers.{config.num_hidden_layers}."
    if name.startswith(MTP_BLOCK):
        return beyond, name.removeprefix(MTP_BLOCK)
    if name.startswith(MTP):
        return beyond, architecture.mtp[name.removeprefix(MTP)]
    layer = PLAIN_LAYER.match(name)
    return (layer[0], name[layer.end() :]) if layer else ("", name)


def written_names(architecture: Architecture, config: ModelConfig, keep_mtp: bool) -> dict[str, str]:
    """The plain name of each tensor that is written, by its name in the files.

    Args:
        keep_mtp: those of multi-token prediction too.
    """
    names = {
        found[0].tensor: name
        for name, found in places(architecture, config).items()
        if keep_mtp or not name.startswith(MTP)
    }
    if keep_mtp and config.num_nextn_predict_layers:
        names |= {name: plain for name, plain in mtp_copies(config).items() if plain in names.values()}
    return names


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """The plain name of what the layer of multi-token prediction holds once more, by its name in the files."""
    return {f"model.layers.{config.num_hidden_layers}.{name}": plain for plain, name in MTP_COPIES.items()}
