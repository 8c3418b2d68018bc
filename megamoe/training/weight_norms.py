"""Norms of the weights by kind: of the fp32 masters, wherever they lie."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from megamoe.checkpoint.engine_state import stretches_by_group
from megamoe.model.names import weight_kind
from megamoe.training.zero_step import sum_of_squares


class WeightNorms:
    """The L2 norm of each `weight_kind` over all ranks, each of which owns other values."""

    def __init__(self, engine: Any):
        self._zero = engine.optimizer
        self._kinds = list(dict.fromkeys(weight_kind(name) for name, _ in engine.module.named_parameters()))
        self._runs: dict[str, list[tuple[int, int, int]]] = defaultdict(list)  # of each kind: group, start, end
        for group, stretches in enumerate(stretches_by_group(engine)):
            for one in stretches:
                runs, start = self._runs[weight_kind(one.name)], one.offset
                if runs and runs[-1][0] == group and runs[-1][2] == start:  # one run with its neighbour
                    start = runs.pop()[1]
                runs.append((group, start, one.offset + one.count))

    def squares(self) -> Tensor:
        """(kinds,) fp64, where the masters lie: sums of the squares of this rank's values."""
        masters = self._zero.single_partition_of_fp32_groups
        none = masters[0].new_zeros((), dtype=torch.float64)
        runs = ([masters[group].detach()[start:end] for group, start, end in self._runs[kind]] for kind in self._kinds)
        return torch.stack([sum_of_squares(one) if one else none for one in runs])

    def of(self, squares: list[float]) -> dict[str, float]:
        """The norms by kind, of the squares over all ranks."""
        return dict(zip(self._kinds, map(math.sqrt, squares), strict=True))
