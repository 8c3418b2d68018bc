"""The learning-rate schedule in a DeepSpeed JSON: its types, the keys of each, and the numbers that they come to.

`training/schedule.py` computes with those numbers. Types and keys are DeepSpeed's (`runtime/lr_schedules.py`) but for
WarmupStableDecayLR and `decay_min_ratio`, which it does not have. Every type has a linear warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from megamoe.config.model import JsonModel, validate
from megamoe.config.recipe_keys import NUMBER, key_problems, value_problems
from megamoe.utils.errors import Problems, UserError, shown

Decay = Literal["linear", "cosine", "1-sqrt"]
Peak = Annotated[float, Field(gt=0)]
"""Learning rate at the end of the warm-up."""
Initial = Annotated[float, Field(ge=0)]
"""Learning rate at step 0."""
WarmupSteps = Annotated[int, Field(ge=0)]
"""Steps of linear warm-up."""
TotalSteps = Annotated[int, Field(gt=0)]
"""Step at which the decay ends, and the last that a run may take."""
Ratio = Annotated[float, Field(ge=0, le=1)]
"""A share of the peak."""


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
    warmup_type: Literal["linear"]
    """Must be said: DeepSpeed's own default is "log"."""

    def schedule(self) -> Schedule:
        return Schedule(self.warmup_max_lr, self.warmup_num_steps, self.warmup_min_lr)


class WarmupDecayLR(JsonModel):
    """A linear decay from the end of the warm-up on."""

    warmup_max_lr: Peak
    warmup_num_steps: WarmupSteps
    total_num_steps: TotalSteps
    warmup_min_lr: Initial = 0.0
    decay_min_ratio: Ratio | None = None
    """Share of the peak that the decay ends at; without it, warmup_min_lr, where DeepSpeed's ends."""
    warmup_type: Literal["linear"]

    def schedule(self) -> Schedule:
        peak, initial, warmup, total = (
            self.warmup_max_lr, self.warmup_min_lr, self.warmup_num_steps, self.total_num_steps
        )  # fmt: skip
        floor = initial if self.decay_min_ratio is None else self.decay_min_ratio * peak
        return Schedule(peak, warmup, initial, "linear", total - warmup, total, floor)


class WarmupStableDecayLR(JsonModel):
    """A constant rate after the warm-up, then a decay over the last steps (arXiv 2404.06395, 2405.18392)."""

    warmup_max_lr: Peak
    warmup_num_steps: WarmupSteps
    total_num_steps: TotalSteps
    decay_num_steps: Annotated[int, Field(gt=0)]
    """Steps of the decay, which ends at total_num_steps."""
    decay_type: Literal["linear", "1-sqrt"] = "linear"
    """Its shape."""
    warmup_min_lr: Initial = 0.0
    decay_min_ratio: Ratio | None = None
    """As of WarmupDecayLR."""
    warmup_type: Literal["linear"]

    def schedule(self) -> Schedule:
        linear = WarmupDecayLR(**self.model_dump(exclude={"decay_num_steps", "decay_type"})).schedule()
        return replace(linear, decay=self.decay_type, decay_steps=self.decay_num_steps)


class WarmupCosineLR(JsonModel):
    """Half a cosine from the end of the warm-up on. Its peak is optimizer.params.lr, as DeepSpeed has it."""

    warmup_num_steps: WarmupSteps
    total_num_steps: TotalSteps
    warmup_min_ratio: Ratio = 0.0
    """Share of the peak at step 0."""
    cos_min_ratio: Ratio = 0.0001
    """Share of the peak that the decay ends at."""
    warmup_type: Literal["linear"]

    def schedule(self, peak: float) -> Schedule:
        warmup, total = self.warmup_num_steps, self.total_num_steps
        initial, floor = self.warmup_min_ratio * peak, self.cos_min_ratio * peak
        return Schedule(peak, warmup, initial, "cosine", total - warmup, total, floor)


TYPES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (WarmupDecayLR, WarmupCosineLR, WarmupStableDecayLR, WarmupLR)
}


# Keys of the other types that WarmupCosineLR does not have, and where it has what they say.
COSINE_HAS = {
    "warmup_max_lr": "optimizer.params.lr",
    "warmup_min_lr": "scheduler.params.warmup_min_ratio",
    "decay_min_ratio": "scheduler.params.cos_min_ratio",
}


def read_schedule(ds: dict[str, Any], where: str) -> Schedule:
    """The schedule in a DeepSpeed JSON. Raises UserError."""
    section = ds.get("scheduler", {})
    if problems := key_problems(section, "scheduler", where):
        raise UserError(*problems)
    kind = section.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise UserError(
            f'{where}: "scheduler" is {shown(kind)}; give {{"type": "WarmupDecayLR", "params": {{...}}}}, or one of '
            f"{', '.join(TYPES)} as its type."
        )
    params = section.get("params", {})
    schedule = _read_cosine(ds, params, where) if kind == "WarmupCosineLR" else _read(TYPES[kind], params, where)
    if problems := schedule.problems():
        raise UserError(*(f"{where}: scheduler.params: {problem}" for problem in problems))
    return schedule


def _read(kind: type[Any], params: Any, where: str, *peak: float) -> Schedule:
    return validate(kind, params, f"{where}: scheduler.params").schedule(*peak)


def _read_cosine(ds: dict[str, Any], params: Any, where: str) -> Schedule:
    problems = Problems()
    lr = problems.attempt(_optimizer_lr, ds, where)
    if isinstance(params, dict):
        problems += [
            f"{where}: scheduler.params: WarmupCosineLR has no {key}; give {COSINE_HAS[key]}."
            for key in params
            if key in COSINE_HAS
        ]
        params = {key: value for key, value in params.items() if key not in COSINE_HAS}
    schedule = problems.attempt(_read, WarmupCosineLR, params, where, lr or 1.0)
    problems.refuse()
    return schedule


def _optimizer_lr(ds: dict[str, Any], where: str) -> float:
    """The peak of WarmupCosineLR. Raises UserError."""
    optimizer = ds.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    lr: Any = params.get("lr") if isinstance(params, dict) else None
    problems = [] if lr is None else value_problems(NUMBER, "optimizer.params.lr", lr, where)
    if problems:
        raise UserError(*problems)
    if not lr:
        raise UserError(
            f"{where}: optimizer.params.lr is {shown(lr)}, but WarmupCosineLR has its peak there; give one above 0."
        )
    return float(lr)
