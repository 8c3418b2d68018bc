"""The learning-rate schedule in a DeepSpeed JSON: its types, the keys of each, and the numbers that they come to.

`training/schedule.py` computes with those numbers. Types and keys are DeepSpeed's (`runtime/lr_schedules.py`) but for
WarmupStableDecayLR and `decay_min_ratio`, which it does not have. Every type has a linear warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from megamoe.config.model import JsonModel, validate
from megamoe.utils.errors import Problems, UserError, shown

Decay = Literal["linear", "cosine", "1-sqrt"]
Peak = Annotated[float, Field(gt=0, description="Learning rate at the end of the warm-up.")]
Initial = Annotated[float, Field(ge=0, description="Learning rate at step 0.")]
WarmupSteps = Annotated[int, Field(ge=0, description="Steps of linear warm-up.")]
TotalSteps = Annotated[int, Field(gt=0, description="Step at which the decay ends, and the last that a run may take.")]
Ratio = Annotated[float, Field(ge=0, le=1)]  # of the peak
Linear = Annotated[
    Literal["linear"],
    Field(description='Shape of the warm-up. It must be given, for DeepSpeed\'s own default is "log".'),
]


@dataclass(frozen=True)
class Schedule:
    """The numbers of a schedule of any type: the keywords of `training.schedule.learning_rate`."""

    peak: float
    warmup_steps: int
    initial: float = 0.0  # learning rate at step 0
    decay: Decay | None = None  # its shape; None for a constant rate
    decay_steps: int = 0  # the last ones before `total_steps`
    total_steps: int | None = None  # None: the schedule has no end
    floor: float = 0.0  # learning rate from `total_steps` on

    def problems(self) -> list[str]:
        """What does not fit together, in the words of the JSON."""
        warmup, decay, total = self.warmup_steps, self.decay_steps, self.total_steps
        if total is None:
            return []
        if warmup >= total:
            return [f"warmup_num_steps is {warmup}, not below total_num_steps {total}; lower it."]
        if warmup + decay > total:
            return [
                f"decay_num_steps is {decay}, but warmup_num_steps {warmup} leaves {total - warmup} of "
                f"total_num_steps {total}; lower it."
            ]
        return []


class WarmupLR(JsonModel):
    """A constant rate after the warm-up."""

    warmup_max_lr: Peak
    warmup_num_steps: WarmupSteps
    warmup_min_lr: Initial = 0.0
    warmup_type: Linear

    def schedule(self, lr: float) -> Schedule:
        return Schedule(self.warmup_max_lr, self.warmup_num_steps, self.warmup_min_lr)


class WarmupDecayLR(WarmupLR):
    """A linear decay from the end of the warm-up on."""

    total_num_steps: TotalSteps
    decay_min_ratio: Ratio | None = None
    """Share of the peak that the decay ends at; without it, warmup_min_lr, where DeepSpeed's ends."""

    def schedule(self, lr: float) -> Schedule:
        peak, total = self.warmup_max_lr, self.total_num_steps
        floor = self.warmup_min_lr if self.decay_min_ratio is None else self.decay_min_ratio * peak
        decay_steps = total - self.warmup_num_steps
        return replace(super().schedule(lr), decay="linear", decay_steps=decay_steps, total_steps=total, floor=floor)


class WarmupStableDecayLR(WarmupDecayLR):
    """A constant rate after the warm-up, then a decay over the last steps (arXiv 2404.06395, 2405.18392)."""

    decay_num_steps: Annotated[int, Field(gt=0)]
    """Steps of the decay, which ends at total_num_steps."""
    decay_type: Literal["linear", "1-sqrt"] = "linear"
    """Its shape."""

    def schedule(self, lr: float) -> Schedule:
        return replace(super().schedule(lr), decay=self.decay_type, decay_steps=self.decay_num_steps)


class WarmupCosineLR(JsonModel):
    """Half a cosine from the end of the warm-up on. Its peak is optimizer.params.lr, as DeepSpeed has it."""

    warmup_num_steps: WarmupSteps
    total_num_steps: TotalSteps
    warmup_min_ratio: Ratio = 0.0
    """Share of the peak at step 0."""
    cos_min_ratio: Ratio = 0.0001
    """Share of the peak that the decay ends at."""
    warmup_type: Linear
    warmup_max_lr: Any = None

    @field_validator("warmup_max_lr")
    @classmethod
    def _has_its_peak_elsewhere(cls, value: Any) -> None:
        raise ValueError(f"it is {shown(value)}, but the peak of WarmupCosineLR is optimizer.params.lr; move it there.")

    def schedule(self, lr: float) -> Schedule:
        warmup, total = self.warmup_num_steps, self.total_num_steps
        initial, floor = self.warmup_min_ratio * lr, self.cos_min_ratio * lr
        return Schedule(lr, warmup, initial, "cosine", total - warmup, total, floor)


TYPES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (WarmupDecayLR, WarmupCosineLR, WarmupStableDecayLR, WarmupLR)
}


class Scheduler(JsonModel):
    type: Any = None
    params: Any = Field(default={})


def parse_schedule(section: Any, lr: float | None, where: str) -> Schedule:
    """The schedule in the "scheduler" section of a DeepSpeed JSON. Raises UserError.

    Args:
        lr: the optimizer's, the peak of WarmupCosineLR.
        where: path of the JSON.
    """
    scheduler: Scheduler = validate(Scheduler, section, f"{where}: scheduler")
    kind, params, where = scheduler.type, scheduler.params, f"{where}: scheduler"
    if not isinstance(kind, str) or kind not in TYPES:
        raise UserError(
            f'{where}: "type" is {shown(kind)}; give "scheduler": {{"type": "WarmupDecayLR", "params": {{...}}}}, or '
            f"one of {', '.join(TYPES)} as its type."
        )
    problems = Problems()
    if kind == "WarmupCosineLR" and not lr:
        problems.append(
            f"{where}: optimizer.params.lr is {shown(lr)}, but WarmupCosineLR has its peak there; give one above 0."
        )
    settings = problems.attempt(validate, TYPES[kind], params, f"{where}.params")
    if settings:
        schedule: Schedule = settings.schedule(lr or 1.0)
        problems += [f"{where}.params: {problem}" for problem in schedule.problems()]
    problems.refuse()
    return schedule
