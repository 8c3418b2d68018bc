"""Means of the steps before: what a step's loss and norm are compared with."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean
from typing import Any


class RunningWindow:
    """The last values of a series, and how far a new one lies above them."""

    def __init__(self, size: int, floor: float):
        """
        Args:
            size: number of values; from half of it on, new ones are judged.
            floor: least standard deviation, as a share of the mean, so that a flat series does not alarm.
        """
        self.values: deque[float] = deque(maxlen=size)  # those that are no spikes; the oldest one goes
        self._least = max(size // 2, 2)
        self._floor = floor

    @property
    def mean(self) -> float | None:
        """None without any value."""
        return fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Of a sample, at least the floor; None while there are too few values."""
        mean, count = self.mean, len(self.values)
        if mean is None or count < self._least:
            return None
        squares = math.fsum((value - mean) ** 2 for value in self.values)  # exact, so alike on all processors
        return max(math.sqrt(squares / (count - 1)), self._floor * abs(mean), math.ulp(1.0))

    def z_score(self, value: float) -> float | None:
        """By how many standard deviations `value` lies above the mean; None while there are too few values."""
        mean, std = self.mean, self.std
        return None if mean is None or std is None else (value - mean) / std


@dataclass
class SmoothedLoss:
    """The exponential mean of a series, its least value so far, and since when it climbs."""

    steps: int  # over which it is smoothed; before so many it counts for nothing
    slack: float  # up to so much above its best it does not climb, but varies
    low_step: int = 0  # the last one before it began to climb; at first the one before that of its first loss
    sum: float = 0.0
    weight: float = 0.0  # of the losses in `sum`; kept, for another run may have smoothed over other steps
    count: int = 0
    best: float | None = None
    best_step: int = 0

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step."""
        decay = 1 - 1 / self.steps
        self.sum = decay * self.sum + (1 - decay) * loss
        self.weight = decay * self.weight + (1 - decay)
        self.count += 1
        mean = self.mean
        if mean is not None and (self.best is None or mean < self.best):
            self.best, self.best_step = mean, step
        if self.climb <= self.slack:
            self.low_step = step

    @property
    def mean(self) -> float | None:
        """None while too few losses are in it."""
        return None if self.count < self.steps else self.sum / self.weight

    @property
    def climb(self) -> float:
        """By how much it lies above its best."""
        mean = self.mean
        return 0.0 if mean is None or self.best is None else mean - self.best

    def state(self) -> dict[str, Any]:
        """The fields with which one over any number of steps goes on; JSON keeps every bit of them."""
        return {name: value for name, value in vars(self).items() if name not in ("steps", "slack")}
