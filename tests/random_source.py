"""Weights drawn at random, as a source: norms are not ones, biases not zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megamoe.config.model import ModelConfig
from megamoe.formats.source import WeightsAlone
from megamoe.model.costs import parameter_shapes


class RandomSource(WeightsAlone):
    """The weights and router statistics of a model."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)
        self.shapes = dict(parameter_shapes(config))
        self.tensors = {name: self._draw(name, shape) for name, shape in self.shapes.items()}
        blocks = config.sparse_blocks if config.router_bias else []
        self.buffers = {
            f"model.layers.{block}.moe.router.selection_bias": self._normal((config.num_local_experts,), 0.5)
            for block in blocks
            if block < config.num_hidden_layers
        }

    def _normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return std * torch.randn(shape, generator=self._generator)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return 1 + self._normal(shape, 0.2)
        if "embed" in name or name.endswith("bias"):
            return self._normal(shape, 0.5)
        return self._normal(shape, 1 / math.sqrt(shape[-1]))

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        return self.tensors[name].flatten()[start : start + count]
