"""Samples per optimizer step, where they rise during a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchWarmup:
    """How many samples each optimizer step takes; steps count from 1. A function of the step alone, so that positions
    in the data do not depend on ranks or on where a run was resumed."""

    full: int  # samples per step after the last stage
    stages: tuple[tuple[int, int], ...] = ()  # (samples per step, last step with so many), both rising

    def samples_of(self, step: int) -> int:
        """Samples that `step` takes."""
        return next((samples for samples, last in self.stages if step <= last), self.full)

    def samples_before(self, step: int) -> int:
        """Samples that all steps before `step` take together: the position of its first one."""
        total = done = 0
        for samples, last in (*self.stages, (self.full, step - 1)):
            reached = min(last, step - 1)
            total += samples * (reached - done)
            done = reached
        return total
