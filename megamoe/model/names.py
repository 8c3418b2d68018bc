"""Names of parameters and buffers: as the engine has them, and the plain ones under which they leave megamoe.

engine  layers.3.moe.deepspeed_moe.experts.deepspeed_experts.1.up_proj.weight     expert ids of one rank
plain   model.layers.3.moe.experts.5.up_proj.weight                               expert ids of the model

Every pattern of such a name is spelled here; `costs.py` lists the plain names themselves.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

ENGINE_EXPERT = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.*)")
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


def plain_name(name: str, first_expert: int = 0) -> str:
    """The plain name of an engine's parameter or buffer.

    Args:
        first_expert: id in the model of the first expert on the rank that `name` comes from.
    """
    expert = ENGINE_EXPERT.fullmatch(name)
    if expert:
        name = f"{expert[1]}.experts.{first_expert + int(expert[2])}.{expert[3]}"
    return PREFIX + name.replace(".deepspeed_moe.", ".")


def engine_name(name: str) -> str:
    """The engine's name, at an ep_size of 1, of a plain name."""
    name = name.removeprefix(PREFIX)
    expert = PLAIN_EXPERT.fullmatch(name)
    if expert:
        return f"{expert[1].removesuffix('experts')}deepspeed_moe.experts.deepspeed_experts.{expert[2]}.{expert[3]}"
    return name.replace(".router.", ".deepspeed_moe.router.")


def local_experts(experts: nn.Module) -> nn.ModuleList:
    """The modules of a rank's experts inside DeepSpeed's `Experts`."""
    return experts.deepspeed_experts  # type: ignore[return-value]


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
    """Whether a parameter, by the engine's name, belongs to an expert."""
    return ENGINE_EXPERT.fullmatch(name) is not None
