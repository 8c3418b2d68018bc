"""Names of parameters and buffers: as the engine has them, and the plain ones under which they leave megamoe.

engine  layers.3.moe.deepspeed_moe.experts.gate_up      (experts of one rank, 2F, D), or `up` (.., F, D) without a gate
plain   model.layers.3.moe.experts.5.gate_proj.weight   (F, D), with the expert's id in the model
        model.layers.3.moe.experts.5.up_proj.weight     (F, D)

The engine stacks the experts of a rank, so one of its parameters is several plain ones, one after the other in memory.
Every pattern of such a name is spelled here; `costs.py` lists the plain names themselves.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# The plain projections of each stacked parameter, in their order within an expert.
STACKED = {"gate_up": ("gate_proj", "up_proj"), "up": ("up_proj",), "down": ("down_proj",)}
ENGINE_EXPERTS = re.compile(rf"(.*)\.deepspeed_moe\.experts\.({'|'.join(STACKED)})")
# One parameter per expert, as DeepSpeed's own `Experts` has them, and megamoe had before it stacked them.
UNSTACKED_EXPERT = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.*)")
PLAIN_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
PLAIN_LAYER = re.compile(r"model\.layers\.(\d+)\.")
PREFIX = "model."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # of other models; here the embedding is the head
BUFFERS = (".router.selection_bias", ".router.running_load")  # saved with the parameters, always in fp32
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


class ExpertName(NamedTuple):
    """The parts of the plain name of an expert's parameter."""

    layer: str  # name of the layer's experts
    expert: int  # id in the model
    parameter: str


@dataclass(frozen=True)
class Part:
    """A plain parameter as a stretch of one of the engine's."""

    name: str  # plain
    start: int  # in the flattened parameter of the engine
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def plain_parts(name: str, shape: tuple[int, ...], first_expert: int = 0) -> list[Part]:
    """The plain parameters or the buffer that one of the engine's, of this name and shape, holds, in order.

    Args:
        first_expert: id in the model of the first expert on the rank that it is from.
    """
    stacked = ENGINE_EXPERTS.fullmatch(name)
    if not stacked:
        return [Part(plain_name(name, first_expert), 0, tuple(shape))]
    layer, projections = f"{PREFIX}{stacked[1]}.experts", STACKED[stacked[2]]
    experts, rows, columns = shape
    part = (rows // len(projections), columns)
    names = [f"{layer}.{first_expert + e}.{projection}.weight" for e in range(experts) for projection in projections]
    return [Part(name, number * math.prod(part), part) for number, name in enumerate(names)]


def plain_name(name: str, first_expert: int = 0) -> str:
    """The plain name of an engine's parameter or buffer that is one plain parameter.

    Args:
        first_expert: id in the model of the first expert on the rank that `name` comes from.
    """
    expert = UNSTACKED_EXPERT.fullmatch(name)
    if expert:
        name = f"{expert[1]}.experts.{first_expert + int(expert[2])}.{expert[3]}"
    return PREFIX + name.replace(".deepspeed_moe.", ".")


def engine_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Part]]:
    """The engine's parameters that hold the plain ones of these shapes, by name, each with what it holds.

    Args:
        shapes: by plain name; of the experts, those of one rank, or of all for an ep_size of 1.
    """
    gated = any(name.endswith(".gate_proj.weight") for name in shapes)
    held: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        held[_parameter_name(name, gated)].append(name)
    return {name: _stretches(sorted(plain, key=_place_in_stack), shapes) for name, plain in held.items()}


def _parameter_name(name: str, gated: bool) -> str:
    """The engine's name of the parameter that holds a plain one."""
    parts = split_expert(name)
    if not parts:
        return engine_name(name)
    projection = parts.parameter.removesuffix(".weight")
    stack = projection.removesuffix("_proj") if projection == "down_proj" or not gated else "gate_up"
    return f"{parts.layer.removeprefix(PREFIX).removesuffix('experts')}deepspeed_moe.experts.{stack}"


def _place_in_stack(name: str) -> tuple[int, bool]:
    """Sorts by expert, and the gate before the projection that it gates."""
    parts = split_expert(name)
    return (parts.expert, not parts.parameter.startswith("gate_proj")) if parts else (0, False)


def _stretches(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    starts = itertools.accumulate((math.prod(shapes[name]) for name in names), initial=0)
    return [Part(name, start, tuple(shapes[name])) for name, start in zip(names, starts, strict=False)]


def engine_name(name: str) -> str:
    """The engine's name of a buffer, or of a parameter that is not an expert's, of a plain name."""
    return name.removeprefix(PREFIX).replace(".router.", ".deepspeed_moe.router.")


def split_expert(name: str) -> ExpertName | None:
    """The parts of a plain name; None if it is not an expert's."""
    expert = PLAIN_EXPERT.fullmatch(name)
    return ExpertName(expert[1], int(expert[2]), expert[3]) if expert else None


def same_expert_of_first_rank(name: str, experts_per_rank: int) -> str:
    """The plain name of the first rank's expert at the place that the expert in `name` has on its own rank."""
    parts = split_expert(name)
    return f"{parts.layer}.{parts.expert % experts_per_rank}.{parts.parameter}" if parts else name


def expert_id(name: str) -> int | None:
    """Id of the expert to which the parameter of a plain name belongs; None if to none."""
    parts = split_expert(name)
    return parts.expert if parts else None


def layer_id(name: str) -> int | None:
    """Id of the layer to which the parameter of a plain name belongs; None if to none."""
    layer = PLAIN_LAYER.match(name)
    return int(layer[1]) if layer else None


def is_buffer(name: str) -> bool:
    """Whether a plain or an engine's name is that of a router's statistics."""
    return name.endswith(BUFFERS)


def is_norm(name: str) -> bool:
    """Whether a parameter, by its plain or the engine's name, is the weight of a norm."""
    return "norm" in name


def is_undecayed(name: str) -> bool:
    """Whether a parameter, by its plain or the engine's name, has no weight decay: norms and latents."""
    return is_norm(name) or name.endswith("latents")


def is_residual_projection(name: str) -> bool:
    """Whether a parameter, by its plain or the engine's name, writes into the residual stream."""
    return name.endswith(RESIDUAL_PROJECTIONS)


def is_engine_expert(name: str) -> bool:
    """Whether a parameter, by the engine's name, belongs to experts."""
    return ENGINE_EXPERTS.fullmatch(name) is not None
