"""Norms of the weights by kind: of the fp32 masters, wherever they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megamoe.checkpoint.engine_state import stretches_by_group
from megamoe.model.names import weight_kind
from megamoe.training.zero_step import sum_of_squares


def weight_squares(engine: Any) -> dict[str, Tensor]:
    """By `weight_kind`, the sum of the squares of this rank's masters: () fp64, where they lie. Ranks own other values
    each, so the sum over all of them is the square of the norm."""
    masters = [master.detach() for master in engine.optimizer.single_partition_of_fp32_groups]
    held = {weight_kind(name): [masters[0][:0]] for name, _ in engine.module.named_parameters()}  # on all ranks alike
    for master, stretches in zip(masters, stretches_by_group(engine), strict=True):
        for one in stretches:
            held[weight_kind(one.name)].append(master[one.offset : one.offset + one.count])
    return {kind: sum_of_squares(values) for kind, values in held.items()}
