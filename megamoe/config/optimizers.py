"""The optimizers that megamoe trains with, one entry each: their name in the DeepSpeed JSON, settings and state.

The checks of the DeepSpeed JSON, checkpoints and the planner read this table, so that a new optimizer is one entry
in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from megamoe.config.model import JsonModel
from megamoe.config.recipe_sections import Number, Share, Unread

MASTERS = "fp32"  # the name of the fp32 masters, where others are those of state tensors


@dataclass(frozen=True)
class StateTensor:
    """What an optimizer keeps of weights from step to step, split over the ranks as the fp32 masters are."""

    name: str  # key in torch's state of the optimizer, and file in a Universal Checkpoint
    dtype: torch.dtype = torch.float32
    of: Literal["all", "matrices", "others"] = "all"  # matrices: `is_projection` of `model/names.py`
    begins_late: bool = False  # a checkpoint without it is restored, and it begins there


# The average of the masters, which any optimizer keeps whose groups have the setting AVERAGE_DECAY.
AVERAGE = StateTensor("ema", begins_late=True)
AVERAGE_DECAY = "ema_decay"


Betas = Annotated[list[Share], Field(min_length=2, max_length=2)]


class Params(JsonModel):
    """Settings of any optimizer; none adds a state, as amsgrad does."""

    lr: Number | None = None
    weight_decay: Number = Unread


class AdamParams(Params):
    betas: Betas = Unread
    eps: Number = Unread
    torch_adam: bool = False
    adam_w_mode: bool = Unread
    fused: bool = Unread
    foreach: bool = Unread
    bias_correction: bool = Unread


class LionParams(Params):
    betas: Betas = Unread


class MuonParams(Params):
    muon_lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of the matrices; the scheduler has that of the other parameters, which AdamW takes."""
    adam_lr: Number | None = None
    momentum: Share = Unread
    betas: Betas = Unread
    eps: Number = Unread


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer as DeepSpeed makes it."""

    names: tuple[str, ...]  # as optimizer.type in the DeepSpeed JSON
    params: type[Params]  # as optimizer.params there
    state: tuple[StateTensor, ...]
    counts_steps: bool = True  # keeps the number of its steps, as "step"
    builders: tuple[str, str] | None = None  # DeepSpeed's, of operators for states on the device, and offloaded ones
    offloaded_on_cpu: bool = False  # DeepSpeed has no operator for CPU but the one for offloaded states

    @property
    def splits_matrices(self) -> bool:
        """Whether it treats matrices in another way than the other parameters, as Muon does."""
        return any(tensor.of != "all" for tensor in self.state)

    def state_of(self, is_matrix: bool) -> list[StateTensor]:
        """Of a matrix, or of another parameter."""
        absent = "others" if is_matrix else "matrices"
        return [tensor for tensor in self.state if tensor.of != absent]

    def state_bytes(self, is_matrix: bool) -> int:
        """Bytes of state per weight, beyond the fp32 master."""
        return sum(tensor.dtype.itemsize for tensor in self.state_of(is_matrix))


OPTIMIZERS = [
    OptimizerSpec(
        names=("Adam", "AdamW"),
        params=AdamParams,
        state=(StateTensor("exp_avg"), StateTensor("exp_avg_sq")),
        builders=("FusedAdamBuilder", "CPUAdamBuilder"),
    ),
    # https://arxiv.org/abs/2302.06675
    OptimizerSpec(
        names=("Lion",),
        params=LionParams,
        state=(StateTensor("exp_avg"),),
        builders=("FusedLionBuilder", "CPULionBuilder"),
        offloaded_on_cpu=True,
    ),
    # `training/muon.py`, with DeepSpeed's keys.
    OptimizerSpec(
        names=("Muon",),
        params=MuonParams,
        state=(
            StateTensor("momentum_buffer", of="matrices"),
            StateTensor("exp_avg", of="others"),
            StateTensor("exp_avg_sq", of="others"),
        ),
    ),
]


def find_optimizer(name: object) -> OptimizerSpec | None:
    """The optimizer of that name, in the DeepSpeed JSON's spelling or in DeepSpeed's own, which is lower case; None if
    there is none."""
    for spec in OPTIMIZERS:
        if name in spec.names or name in [other.lower() for other in spec.names]:
            return spec
    return None
