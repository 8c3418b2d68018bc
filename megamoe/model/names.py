"""Names of parameters: as the engine has them, and the plain ones under which they leave megamoe.

engine  layers.3.moe.deepspeed_moe.experts.deepspeed_experts.1.up_proj.weight     expert ids of one rank
plain   model.layers.3.moe.experts.5.up_proj.weight                               expert ids of the model
"""

from __future__ import annotations

import re

ENGINE_EXPERT = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.*)")
PLAIN_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
PLAIN_LAYER = re.compile(r"model\.layers\.(\d+)\.")
PREFIX = "model."
BUFFERS = (".router.selection_bias", ".router.running_load")  # what is saved beside the parameters, always in fp32


def plain_name(name: str, first_expert: int = 0) -> str:
    """The plain name of an engine's parameter or buffer.

    Args:
        first_expert: id in the model of the first expert on the rank of which `name` comes.
    """
    expert = ENGINE_EXPERT.fullmatch(name)
    if expert:
        name = f"{expert[1]}.experts.{first_expert + int(expert[2])}.{expert[3]}"
    return PREFIX + name.replace(".deepspeed_moe.", ".")


def engine_name(name: str) -> str:
    """The engine's name, at an ep_size of 1, of what is plainly called `name`."""
    name = name.removeprefix(PREFIX)
    expert = PLAIN_EXPERT.fullmatch(name)
    if expert:
        return f"{expert[1].removesuffix('experts')}deepspeed_moe.experts.deepspeed_experts.{expert[2]}.{expert[3]}"
    return name.replace(".router.", ".deepspeed_moe.router.")


def same_expert_of_first_rank(name: str, experts_per_rank: int) -> str:
    """The plain name of the first rank's expert that stands where the expert in `name` stands on its own rank."""
    expert = PLAIN_EXPERT.fullmatch(name)
    return f"{expert[1]}.{int(expert[2]) % experts_per_rank}.{expert[3]}" if expert else name


def expert_id(name: str) -> int | None:
    """Id of the expert to which the parameter of a plain name belongs; None if to none."""
    expert = PLAIN_EXPERT.fullmatch(name)
    return int(expert[2]) if expert else None


def layer_id(name: str) -> int | None:
    """Id of the layer to which the parameter of a plain name belongs; None if to none."""
    layer = PLAIN_LAYER.match(name)
    return int(layer[1]) if layer else None


def is_buffer(name: str) -> bool:
    """Whether a plain or an engine's name is that of a router's statistics."""
    return name.endswith(BUFFERS)


def is_undecayed(name: str) -> bool:
    """Whether a parameter, by its plain or the engine's name, has no weight decay: norms and latents."""
    return "norm" in name or name.endswith("latents")
