"""The optimizers that megamoe trains with, one entry each: their name in the DeepSpeed JSON, settings and state.

The checks of the DeepSpeed JSON, checkpoints and the planner read this table, so that a new optimizer is one entry
in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

MASTERS = "fp32"  # the name of the fp32 masters, where others are those of state tensors


class Layout(Enum):
    """How a state tensor lies on the ranks."""

    PARTITIONED = "partitioned"  # split over the ranks as the fp32 masters are
    WHOLE = "whole"  # of a whole parameter, on one rank


@dataclass(frozen=True)
class StateTensor:
    """What an optimizer keeps of every weight from step to step."""

    name: str  # key in torch's state of the optimizer, and file in a Universal Checkpoint
    dtype: torch.dtype = torch.float32
    layout: Layout = Layout.PARTITIONED
    begins_late: bool = False  # a checkpoint without it is restored, and it begins there


# The average of the masters, which any optimizer keeps whose groups have the setting AVERAGE_DECAY.
AVERAGE = StateTensor("ema", begins_late=True)
AVERAGE_DECAY = "ema_decay"


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer as DeepSpeed makes it."""

    names: tuple[str, ...]  # as optimizer.type in the DeepSpeed JSON
    params: frozenset[str]  # known keys of optimizer.params
    state: tuple[StateTensor, ...]
    counts_steps: bool = True  # keeps the number of its steps, as "step"
    unsaved_if: frozenset[str] = frozenset()  # params that add state beyond `state` if true: refused
    builders: tuple[str, str] | None = (
        None  # DeepSpeed's, of the operators for states on the device, and offloaded ones
    )
    offloaded_on_cpu: bool = False  # DeepSpeed has no operator for CPU but the one for offloaded states

    @property
    def state_bytes(self) -> int:
        """Bytes of state per weight, beyond the fp32 master."""
        return sum(tensor.dtype.itemsize for tensor in self.state)

    @property
    def whole(self) -> list[str]:
        """Names of the state tensors that are not split as the fp32 masters are."""
        return [tensor.name for tensor in self.state if tensor.layout is Layout.WHOLE]


OPTIMIZERS = [
    OptimizerSpec(
        names=("Adam", "AdamW"),
        params=frozenset(
            {
                "lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "fused", "foreach",
                "bias_correction", "amsgrad",
            }
        ),
        state=(StateTensor("exp_avg"), StateTensor("exp_avg_sq")),
        unsaved_if=frozenset({"amsgrad"}),
        builders=("FusedAdamBuilder", "CPUAdamBuilder"),
    ),
    # https://arxiv.org/abs/2302.06675
    OptimizerSpec(
        names=("Lion",),
        params=frozenset({"lr", "betas", "weight_decay"}),
        state=(StateTensor("exp_avg"),),
        builders=("FusedLionBuilder", "CPULionBuilder"),
        offloaded_on_cpu=True,
    ),
]  # fmt: skip


def optimizer_names() -> list[str]:
    """Names of all optimizers, as in the DeepSpeed JSON."""
    return [name for spec in OPTIMIZERS for name in spec.names]


def optimizer_params() -> frozenset[str]:
    """Keys of optimizer.params that some optimizer takes."""
    return frozenset().union(*(spec.params for spec in OPTIMIZERS))


def unsaved_params() -> frozenset[str]:
    """Settings that add a state which is not saved, of all optimizers."""
    return frozenset().union(*(spec.unsaved_if for spec in OPTIMIZERS))


def find_optimizer(name: object) -> OptimizerSpec | None:
    """The optimizer of that name, in the DeepSpeed JSON's spelling or in DeepSpeed's own, which is lower case; None if
    there is none."""
    for spec in OPTIMIZERS:
        if name in spec.names or name in [other.lower() for other in spec.names]:
            return spec
    return None
