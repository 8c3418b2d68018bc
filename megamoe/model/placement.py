"""Whether a model's experts fit on ranks, and into a precision."""

from __future__ import annotations

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import DTYPES
from megamoe.model.grouped_gemm import ROW_ALIGNMENT
from megamoe.model.topology import ExpertTopology


def placement_problems(model: ModelConfig, ep_size: int, dtype: str, world_size: int, preset: str) -> list[str]:
    """What keeps a model's experts from these ranks, or from a precision, one sentence each."""
    multiple = ROW_ALIGNMENT // DTYPES[dtype].itemsize
    return ExpertTopology.problems(ep_size, model.num_local_experts, world_size, preset) + [
        f"{name} is {width} in {preset}, but the experts' GEMMs in {dtype} need rows of a multiple of "
        f"{ROW_ALIGNMENT} bytes; make it a multiple of {multiple}."
        for name, width in (("hidden_size", model.hidden_size), (model.expert_size_field, model.expert_size))
        if width % multiple
    ]
