"""The averaged weights of a checkpoint in the place of its weights: what `--ema` reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megamoe.config.optimizers import AVERAGE, MASTERS
from megamoe.formats.source import Source, WeightsAlone
from megamoe.utils.errors import UserError


class AveragedWeights(WeightsAlone):
    """A source whose weights are the averaged ones of another, with the router statistics of that."""

    def __init__(self, source: Source):
        self._source = source
        self.shapes, self.buffers = source.shapes, source.buffers

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        assert kind == MASTERS
        return self._source.read(name, AVERAGE.name, start, count)


def averaged(source: Source, where: Path) -> Source:
    """The averaged weights in `source`. Raises UserError where it holds none."""
    if AVERAGE.name not in source.state_names:
        raise UserError(
            f"{where} holds no averaged weights, which a run saves that trains with --ema_decay; give a checkpoint of "
            "one, or leave --ema out."
        )
    return AveragedWeights(source)
