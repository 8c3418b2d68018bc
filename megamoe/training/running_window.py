"""Means of the steps before: what a step's loss and norm are compared with."""

from __future__ import annotations

import math
from collections import deque
from typing import Any


class RunningWindow:
    """The last values of a series, and how far a new one lies above them."""

    def __init__(self, size: int, floor: float):
        """
        Args:
            size: number of values; from half of it on, new ones are judged.
            floor: least standard deviation, as a share of the mean, so that a flat series does not alarm.
        """
        self._values: deque[float] = deque(maxlen=size)
        self._least = max(size // 2, 2)
        self._floor = floor
        self.mean: float | None = None  # None without any value
        self.std: float | None = None  # of a sample, at least the floor; None while there are too few values

    def add(self, value: float) -> None:
        """Take a value that is no spike; the oldest one goes."""
        self._values.append(value)
        self._measure()

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._measure()

    def _measure(self) -> None:
        """Once for each value that is taken; exact sums, so that a restored window has them bit for bit."""
        values, count = self._values, len(self._values)
        self.mean = math.fsum(values) / count if count else None
        self.std = None
        if self.mean is not None and count >= self._least:
            mean = self.mean
            squares = math.fsum((value - mean) ** 2 for value in values)
            self.std = max(math.sqrt(squares / (count - 1)), self._floor * abs(mean), math.ulp(1.0))

    def z_score(self, value: float) -> float | None:
        """By how many standard deviations `value` lies above the mean; None while there are too few values."""
        if self.mean is None or self.std is None:
            return None
        return (value - self.mean) / self.std

    def state(self) -> list[float]:
        """For `restore`; JSON keeps every bit of it."""
        return list(self._values)

    def restore(self, state: list[float]) -> None:
        """Go on from `state`, of a window of any size."""
        self._values.clear()
        self._values.extend(state)
        self._measure()


class SmoothedLoss:
    """The exponential mean of a series, its least value so far, and since when it climbs."""

    def __init__(self, steps: int, slack: float, first: int = 0):
        """
        Args:
            steps: over which it is smoothed; before so many it counts for nothing.
            slack: up to so much above its best it does not climb, but varies.
            first: the step before that of its first loss.
        """
        self._steps = steps
        self._slack = slack
        self._sum = self._weight = 0.0
        self._count = 0
        self.best: float | None = None
        self.best_step = 0
        self.low_step = first  # the last one before it began to climb

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step."""
        decay = 1 - 1 / self._steps
        self._sum = decay * self._sum + (1 - decay) * loss
        self._weight = decay * self._weight + (1 - decay)  # kept, for another run may have smoothed over other steps
        self._count += 1
        mean = self.mean
        if mean is not None and (self.best is None or mean < self.best):
            self.best, self.best_step = mean, step
        if self.climb <= self._slack:
            self.low_step = step

    @property
    def mean(self) -> float | None:
        """None while too few losses are in it."""
        return None if self._count < self._steps else self._sum / self._weight

    @property
    def climb(self) -> float:
        """By how much it lies above its best."""
        mean = self.mean
        return 0.0 if mean is None or self.best is None else mean - self.best

    def state(self) -> dict[str, Any]:
        """For `restore`; JSON keeps every bit of it."""
        return {
            "sum": self._sum,
            "weight": self._weight,
            "count": self._count,
            "best": self.best,
            "best_step": self.best_step,
            "low_step": self.low_step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, of a loss that was smoothed over any number of steps."""
        self._sum, self._weight, self._count = state["sum"], state["weight"], state["count"]
        self.best, self.best_step, self.low_step = state["best"], state["best_step"], state["low_step"]
