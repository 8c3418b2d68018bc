"""What the ranks tell each other in a step besides gradients: one vector, summed by one all-reduce, read once.

Shape legend: E experts, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.host_values import host_values


class Flags(NamedTuple):
    """What a rank says in a step; of all ranks together, whether any of them says it."""

    stop_asked: bool = False
    out_of_time: bool = False
    writing: bool = False  # a checkpoint
    folder_is_gone: bool = False  # the run folder


NO_FLAGS = Flags()
SCALARS = 2 + len(Flags._fields)  # numbers before the counts


@dataclass(frozen=True)
class HostSums:
    """The sums over all ranks, on the host."""

    squares: float
    losses: float
    flags: Flags
    counts: Tensor  # (L, E) int64
    running_loads: Tensor  # (L, E) fp32, as given to `read`


class StepSums:
    """The sums over all ranks, on the device."""

    def __init__(self, squares: Tensor | float, losses: Tensor, flags: Flags, counts: Tensor):
        """Collective.

        Args:
            squares: sum of the squares of the gradients that this rank owns.
            losses: (), sum over this rank's micro-batches.
            counts: (L, E) int64, of this rank's routers.
        """
        scalars = torch.zeros(SCALARS, dtype=torch.float64, device=losses.device)
        scalars[0], scalars[1] = squares, losses
        for index, is_set in enumerate(flags, start=2):
            if is_set:
                scalars[index] = 1  # a number in a kernel; a tensor from the host would wait for the device
        self._sums = torch.cat((scalars, counts.flatten()))  # fp64 is exact for counts
        self._shape = counts.shape
        dist.all_reduce(self._sums)

    @property
    def counts(self) -> Tensor:
        """(L, E) fp64, of all routers."""
        return self._sums[SCALARS:].view(self._shape)

    def read(self, running_loads: Tensor) -> HostSums:
        """Everything on the host, and (L, E) `running_loads` with it: the one wait of a step for the device."""
        values = host_values(torch.cat((self._sums, running_loads.flatten())))()
        squares, losses, *flags = values[:SCALARS]
        counts, running = torch.tensor(values[SCALARS:], dtype=torch.float64).view(2, *self._shape)
        return HostSums(squares, losses, Flags(*(flag > 0 for flag in flags)), counts.long(), running.float())
