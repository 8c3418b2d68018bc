"""The exponential moving average of the weights: a further state tensor of the optimizer, next to Adam's moments.

It lies where the optimizer keeps its state of a master, so checkpoints save, verify and reshard it as they do that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megamoe.config.optimizers import AVERAGE, AVERAGE_DECAY


def decay_at(step: int, decay: float) -> float:
    """The share of the average that stays at a step: (1 + step) / (10 + step) up to `decay`, so that the first weights,
    drawn at random, are soon forgotten. The ramp is that of TensorFlow's `tf.train.ExponentialMovingAverage`; a
    function of the step alone, it needs nothing in a checkpoint."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """An fp32 average of the fp32 masters that this rank owns, where these lie. Every rank makes the same calls.

    It begins as the weights after the first applied step that it is told of, and after step s is d times itself plus
    1 - d times the masters, d being `decay_at(s)`.
    """

    def __init__(self, engine: Any, decay: float):
        """
        Args:
            engine: of `build_engine`, on which no step has been applied yet.
            decay: between 0 and 1.
        """
        self._engine = engine
        self._decay = decay
        for group in engine.optimizer.optimizer.param_groups:  # by this a checkpoint knows that there is an average
            group[AVERAGE_DECAY] = decay

    @property
    def has_begun(self) -> bool:
        """Whether there is an average; the same on every rank."""
        zero = self._engine.optimizer
        return AVERAGE.name in zero.optimizer.state.get(zero.single_partition_of_fp32_groups[0], {})

    @torch.no_grad()
    def update(self) -> None:
        """Call after each applied step. No collective, and no wait for the device."""
        masters, averages = [], []
        for master, state in self._masters():
            if AVERAGE.name in state:
                masters.append(master.data)
                averages.append(state[AVERAGE.name])
            else:  # not before the first step: the optimizer makes its own state where it finds none
                state[AVERAGE.name] = master.detach().clone()
        if averages:
            torch._foreach_lerp_(averages, masters, 1 - decay_at(self._engine.global_steps, self._decay))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model computes with the averaged weights, rounded to its dtype; then with its own again, bit for bit,
        which are the masters, rounded. Collective; not while a step's gradients are gathered.

        After an exception the averaged weights stay, for the other ranks may not come to a collective.
        """
        self._write([state[AVERAGE.name] for _, state in self._masters()])
        yield
        self._write(self._engine.optimizer.single_partition_of_fp32_groups)

    def _masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This rank's flat masters, with the optimizer's state of each."""
        zero = self._engine.optimizer
        return [(master, zero.optimizer.state[master]) for master in zero.single_partition_of_fp32_groups]

    def _write(self, values: list[Tensor]) -> None:
        """Round this rank's flat values into the model, and gather those of the others, as DeepSpeed's step does."""
        zero = self._engine.optimizer
        masters = zero.single_partition_of_fp32_groups
        zero.single_partition_of_fp32_groups = values
        try:
            zero.update_lp_params()
        finally:
            zero.single_partition_of_fp32_groups = masters
