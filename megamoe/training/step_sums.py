"""What the ranks tell each other in a step besides gradients: one vector, summed by one all-reduce, read once.

Shape legend: E experts, L layers with experts, P parts of the loss, N bins of margins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.utils.device_reads import begin_read


class Flags(NamedTuple):
    """What a rank says in a step; of all ranks together, whether any of them says it."""

    stop_asked: bool = False
    out_of_time: bool = False
    writing: bool = False  # a checkpoint
    folder_is_gone: bool = False  # the run folder


NO_FLAGS = Flags()
SCALARS = 1 + len(Flags._fields)  # numbers besides losses and counts


@dataclass(frozen=True)
class HostSums:
    """The sums over all ranks, on the host."""

    squares: float  # of the gradients times the loss scale; NaN or infinite where one is not finite
    losses: list[float]  # (P,), of all micro-batches
    flags: Flags  # whether any rank has set them
    entropies: list[float]  # (L,), of all tokens
    slots: list[float]  # (L,)
    counts: Tensor  # (L, E) int64
    running_loads: Tensor  # (L, E) fp32, as given to `read`


@dataclass(frozen=True)
class StepSums:
    """The sums over all ranks, on the device."""

    scalars: Tensor  # (SCALARS + P + L,) fp64: squares, flags, losses, entropies
    counts: Tensor  # (L, E) fp64, of all routers
    margins: Tensor  # (L, N, E) fp64, or empty

    def read(self, running_loads: Tensor) -> HostSums:
        """Everything on the host, and (L, E) `running_loads` with it: the one wait of a step for the device."""
        values = begin_read(torch.cat((self.scalars, self.counts.flatten(), running_loads.flatten())))()
        size = len(self.scalars)
        squares, *flags = values[:SCALARS]
        layers, experts = self.counts.shape
        means = size - layers
        slots = [sum(values[size + layer * experts :][:experts]) for layer in range(layers)]
        counts, running = torch.tensor(values[size:], dtype=torch.float64).view(2, layers, experts)
        flags = Flags(*(flag > 0 for flag in flags))
        return HostSums(
            squares, values[SCALARS:means], flags, values[means:size], slots, counts.long(), running.float()
        )


def sum_over_ranks(
    squares: Tensor | float, losses: Tensor, flags: Flags, counts: Tensor, entropies: Tensor, margins: Tensor
) -> StepSums:
    """Sum what each rank gives, by one all-reduce. Collective; does not wait for the device.

    Args:
        squares: (), sum of the squares of the gradients that this rank owns, times the loss scale.
        losses: (P,), numbers that are sums over this rank's micro-batches.
        flags: of this rank.
        counts: (L, E) int64, slots that this rank's routers have given each expert.
        entropies: (L,), sums over this rank's tokens.
        margins: (L, N, E) int64, of this rank's tokens in each bin, or empty.
    """
    size = SCALARS + len(losses) + len(entropies)
    scalars = torch.zeros(SCALARS, dtype=torch.float64, device=losses.device)
    # A number is filled in, for `scalars[0] = number` would copy it from the host and wait for the device.
    scalars[0].copy_(squares) if isinstance(squares, Tensor) else scalars[0].fill_(squares)
    for index, is_set in enumerate(flags, start=1):
        if is_set:
            scalars[index].fill_(1)
    sums = torch.cat((scalars, losses, entropies, counts.flatten(), margins.flatten()))  # fp64 is exact for counts
    dist.all_reduce(sums)
    scalars, counts_sum, margins_sum = sums.split((size, counts.numel(), margins.numel()))
    return StepSums(scalars, counts_sum.view(counts.shape), margins_sum.view(margins.shape))
