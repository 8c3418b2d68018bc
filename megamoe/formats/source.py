"""What weights are read from, whatever wrote them, and how they come into a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megamoe.config.optimizers import MASTERS
from megamoe.model.names import plain_name, plain_parts


class Source(Protocol):
    """A model's weights, and where `has_optimizer` its training state, by plain names."""

    has_optimizer: bool
    state_names: tuple[str, ...]  # of the optimizer's state tensors that it holds; none before the first applied step
    shapes: dict[str, tuple[int, ...]]
    buffers: dict[str, Tensor]

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """`count` values of a flattened parameter from `start` on, (count,), often a view of a mapped file; `kind` is
        MASTERS or one of `state_names`."""

    def training_state(self) -> dict[str, Any]:
        """Of a source with optimizer: step counts, schedule, loss scale; optimizer_step is None where the optimizer
        counts none, or has applied none."""


class WeightsAlone:
    """The members of `Source` that have to do with an optimizer."""

    has_optimizer = False
    state_names: tuple[str, ...] = ()

    def training_state(self) -> dict[str, Any]:
        """Of a source with an optimizer alone."""
        raise AssertionError("weights alone have no training state")


def read_whole(source: Source, name: str) -> Tensor:
    """A parameter in its shape, in fp32, often a view of a mapped file."""
    shape = source.shapes[name]
    return source.read(name, MASTERS, 0, math.prod(shape)).view(shape)


class View(WeightsAlone):
    """Weights of another source under other names."""

    def __init__(self, source: Source, names: Mapping[str, str], buffers: dict[str, Tensor], kind: str = MASTERS):
        """
        Args:
            names: those in the source, by those here.
            kind: what of the source is taken.
        """
        self.shapes = {name: source.shapes[held] for name, held in names.items()}
        self.buffers = buffers
        self._source, self._names, self._kind = source, names, kind

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        return self._source.read(self._names[name], self._kind, start, count)


@torch.no_grad()
def load_buffers(model: nn.Module, source: Source) -> None:
    """Give a model, or a rank's part of one, the router statistics in `source`."""
    for name, buffer in model.named_buffers():
        if plain_name(name) in source.buffers:
            buffer.copy_(source.buffers[plain_name(name)])


@torch.no_grad()
def load_weights(model: nn.Module, source: Source, dtype: torch.dtype) -> None:
    """Give a whole model (ep_size 1) the weights in `source`, in `dtype`, and the router statistics, in fp32."""
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype)
        for part in plain_parts(name, tuple(parameter.shape)):
            values.view(-1)[part.start : part.start + part.count] = source.read(part.name, MASTERS, 0, part.count)
        parameter.data = values
    load_buffers(model, source)
