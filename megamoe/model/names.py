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
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# The plain projections of each stacked parameter, in their order within an expert.
STACKED = {"gate_up": ("gate_proj", "up_proj"), "up": ("up_proj",), "down": ("down_proj",)}
STACKED_EXPERTS = re.compile(r"(.*)\.deepspeed_moe\.experts\.(\w+)")  # a KeyError for one that is not in STACKED
PLAIN_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
PLAIN_LAYER = re.compile(r"model\.layers\.(\d+)\.")
PREFIX = "model."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # where it is not the embedding
MTP = "model.mtp."  # before the names of multi-token prediction
BUFFERS = (".router.selection_bias", ".router.running_load")  # saved with the parameters, always in fp32
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
PROJECTIONS = ("_proj.weight", "_proj_with_mqa.weight")  # of attention, MLPs and experts


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
    """The plain parameters that one of the engine's, of this name and shape, holds, in order.

    Args:
        first_expert: id in the model of the first expert on the rank that it is from.
    """
    stacked = STACKED_EXPERTS.fullmatch(name)
    if not stacked:
        return [Part(plain_name(name), 0, tuple(shape))]
    layer, projections = f"{PREFIX}{stacked[1]}.experts", STACKED[stacked[2]]
    experts, rows, columns = shape
    part = (rows // len(projections), columns)
    names = [f"{layer}.{first_expert + e}.{projection}.weight" for e in range(experts) for projection in projections]
    return [Part(name, number * math.prod(part), part) for number, name in enumerate(names)]


def stretches(parts: list[Part], start: int, count: int) -> Iterator[tuple[Part, int, int]]:
    """What `count` values of a flattened parameter of the engine, from `start` on, are in its parts: (part, first value
    in it, number of values)."""
    end = start + count
    first_held = bisect_right(parts, start, key=lambda part: part.start) - 1
    for part in itertools.takewhile(lambda part: part.start < end, parts[first_held:]):
        first = max(start - part.start, 0)
        yield part, first, min(end - part.start, part.count) - first


def plain_name(name: str) -> str:
    """The plain name of an engine's buffer, or of a parameter that is not stacked."""
    return name if name == HEAD else PREFIX + name.replace(".deepspeed_moe.", ".")


def engine_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Part]]:
    """The engine's parameters that hold the plain ones of these shapes, by name, each with what it holds, in order.

    Args:
        shapes: by plain name; of the experts, those of one rank, or of all for an ep_size of 1.
    """
    gated = any(name.endswith(".gate_proj.weight") and split_expert(name) for name in shapes)
    place = {
        f"{projection}.weight": (stack, number)
        for stack in (("gate_up" if gated else "up"), "down")
        for number, projection in enumerate(STACKED[stack])
    }
    held: dict[str, list[tuple[int, int, str]]] = defaultdict(list)  # (expert, place within it, plain name)
    for name in shapes:
        parts = split_expert(name)
        if parts and parts.parameter in place:
            stack, number = place[parts.parameter]
            layer = parts.layer.removeprefix(PREFIX).removesuffix(".experts")
            held[f"{layer}.deepspeed_moe.experts.{stack}"].append((parts.expert, number, name))
        else:
            held[engine_name(name)].append((0, 0, name))
    return {name: _one_after_the_other(sorted(plain), shapes) for name, plain in held.items()}


def _one_after_the_other(held: list[tuple[int, int, str]], shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    starts = itertools.accumulate((math.prod(shapes[name]) for *_, name in held), initial=0)
    return [Part(name, start, tuple(shapes[name])) for (*_, name), start in zip(held, starts, strict=False)]


def engine_shape(name: str, parts: list[Part]) -> tuple[int, ...]:
    """The shape of an engine's parameter that holds these: of experts, (experts, rows, columns)."""
    stacked = STACKED_EXPERTS.fullmatch(name)
    if not stacked:
        return parts[0].shape
    projections = len(STACKED[stacked[2]])
    rows, columns = parts[0].shape
    return len(parts) // projections, projections * rows, columns


def engine_name(name: str) -> str:
    """The engine's name of a plain one that it does not stack."""
    return name.removeprefix(PREFIX).replace(".router.", ".deepspeed_moe.router.")


def split_expert(name: str) -> ExpertName | None:
    """The parts of a plain name; None if it is not an expert's."""
    expert = PLAIN_EXPERT.fullmatch(name)
    return ExpertName(expert[1], int(expert[2]), expert[3]) if expert else None


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
    """Whether a parameter, by its plain or the engine's name, has no weight decay: norms, biases and latents."""
    return is_norm(name) or name.endswith((".bias", ".latents"))


def is_projection(name: str) -> bool:
    """Whether a parameter, by its plain or the engine's name, is a matrix of attention, of an MLP or of experts: what
    Muon orthogonalizes.

    The routers and other gates, which give scores, and what vocabulary or multi-token prediction puts before and behind
    the blocks are none.
    """
    return name.endswith(PROJECTIONS) or is_engine_expert(name)


def is_residual_projection(name: str) -> bool:
    """Whether a parameter, by its plain or the engine's name, writes into the residual stream."""
    return name.endswith(RESIDUAL_PROJECTIONS)


def weight_kind(name: str) -> str:
    """What a parameter, by its plain or the engine's name, is a part of, as logs say it."""
    kinds = {
        ".experts.": "experts", ".router.": "router", ".self_attn.": "attention", "mlp.": "mlp",
        "embed_tokens.": "embedding", HEAD: "head", "mtp.": "mtp",
    }  # fmt: skip
    return "norms" if is_norm(name) else next(kind for part, kind in kinds.items() if part in name)


def is_engine_expert(name: str) -> bool:
    """Whether a parameter, by the engine's name, belongs to experts."""
    return STACKED_EXPERTS.fullmatch(name) is not None
