"""The guard of a run: which steps are spikes, and when the run must go back to a checkpoint.

Its decisions are pure functions of what every rank reads in a step, so all ranks take the same ones without another
message, and a resumed run takes those of one that was not stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from megamoe.config.run import RunConfig
from megamoe.training.running_window import RunningWindow, SmoothedLoss
from megamoe.training.step import StepResult

# Of the standard deviation, as shares of the mean. A norm varies by more than a loss, and clipping bounds what it does.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.2
SLACK = 0.1  # of the margin: a smoothed loss that is higher than that above its best has begun to climb


@dataclass(frozen=True)
class Event:
    """What happened in a step."""

    kind: Literal["skip", "warning"]
    line: str | None  # to be said, if that is not said elsewhere
    values: dict[str, Any]


@dataclass(frozen=True)
class Return:
    """That the run must go back."""

    reason: str
    until: int  # the last step whose checkpoint is good


class Guard:
    """Watches the loss and the norm of every step."""

    def __init__(self, config: RunConfig, warmup: int):
        """
        Args:
            config: of which it reads --guard and what begins with --guard_.
            warmup: first steps, which no window takes: there the weights themselves cause spikes.
        """
        self.config = config
        self._warmup = warmup
        self._begin(0)

    def _begin(self, step: int) -> None:
        """Watch the steps after `step`, with nothing known of those before."""
        size = self.config.guard_window
        self._losses, self._norms = RunningWindow(size, LOSS_FLOOR), RunningWindow(size, NORM_FLOOR)
        self._smoothed = SmoothedLoss(size, SLACK * self.config.guard_margin, step)
        self._in_a_row = 0  # with "act" steps that were skipped, else spikes that were trained on
        self._last_good = step  # before them
        self._has_said_climb = False
        self.guarded_steps = 0  # skipped as spikes

    @property
    def acts(self) -> bool:
        return self.config.guard == "act"

    @property
    def watches(self) -> bool:
        return self.config.guard != "off"

    @property
    def good_until(self) -> int | None:
        """The last step whose checkpoint a climb of the loss would leave good; None where nothing goes back."""
        return self._smoothed.low_step if self.acts else None

    def skips(self, loss: float, norm: float) -> bool:
        """Whether a step with this loss and this finite norm is to be skipped. Changes nothing."""
        return self.acts and self._is_spike(loss, norm)

    def _is_spike(self, loss: float, norm: float) -> bool:
        if not math.isfinite(loss):
            return True
        above = (self._losses.z_score(loss), self._norms.z_score(norm))
        return any(one is not None and one > self.config.guard_deviations for one in above)

    def after(self, step: int, result: StepResult, lowers_scale: bool) -> Event | None:
        """Take what a step has come to; returns what there is to record.

        Args:
            lowers_scale: it was skipped for a gradient that is not finite, which lowers the loss scale of fp16, as is
                needed now and then: it does not count as one of several in a row.
        """
        if not self.watches:
            return None
        self.guarded_steps += result.is_spike
        if not math.isfinite(result.grad_norm):
            self._in_a_row += self.acts and not lowers_scale
            reason = "not finite" + ", loss scale lowered" * lowers_scale
            return Event("skip", None, self._values(step, result, reason))
        if result.is_spike if self.acts else self._is_spike(result.loss, result.grad_norm):
            return self._after_spike(step, result)
        self._in_a_row, self._last_good = 0, step
        if step > self._warmup:
            self._losses.values.append(result.loss)
            self._norms.values.append(result.grad_norm)
        self._smoothed.add(step, result.loss)
        return self._after_climb(step, result)

    def _after_spike(self, step: int, result: StepResult) -> Event | None:
        event = Event("skip" if self.acts else "warning", self._describe_spike(step, result),
                      self._values(step, result, "spike"))  # fmt: skip
        self._in_a_row += 1
        if self.acts:
            return event
        is_first = self._in_a_row == 1
        if self._in_a_row >= self.config.guard_skips:  # it is the new level
            self._losses.values.clear()
            self._norms.values.clear()
            self._in_a_row = 0
        return event if is_first else None

    def _after_climb(self, step: int, result: StepResult) -> Event | None:
        """Where the run does not go back, say once that the loss climbs, and again only after it has come down."""
        climb, margin = self._smoothed.climb, self.config.guard_margin
        if climb < margin / 2:
            self._has_said_climb = False
        if self.acts or climb <= margin or self._has_said_climb:
            return None
        self._has_said_climb = True
        line = f"guard: warning after step {step}: {self._describe_climb()}; with --guard act the run would go back"
        return Event("warning", line, self._values(step, result, "climb"))

    def must_go_back(self) -> Return | None:
        """Why the run must go back to a checkpoint, if it must."""
        if not self.acts:
            return None
        if self._in_a_row >= self.config.guard_skips:
            return Return(f"the last {self._in_a_row} steps were skipped", self._last_good)
        if self._smoothed.climb > self.config.guard_margin:
            return Return(self._describe_climb(), self._smoothed.low_step)
        return None

    # --- what is said and recorded ----------------------------------------------------------------------------------

    def _describe_climb(self) -> str:
        best = self._smoothed.best
        return (
            f"the loss, smoothed over {self.config.guard_window} steps, has climbed {self._smoothed.climb:.3f} nats "
            f"above its best, {best:.3f} at step {self._smoothed.best_step}"
        )

    def _describe_spike(self, step: int, result: StepResult) -> str:
        parts = [
            f"{name} {value:.4g} (mean {window.mean:.4g}, {window.z_score(value):+.1f} standard deviations)"
            for name, value, window in (("loss", result.loss, self._losses), ("norm", result.grad_norm, self._norms))
            if window.std is not None
        ]
        verb = "is skipped as a spike" if self.acts else "is a spike, and is trained on (--guard act skips it)"
        return f"guard: step {step} {verb}: {', '.join(parts) or f'loss {result.loss}'}"

    def _values(self, step: int, result: StepResult, reason: str) -> dict[str, Any]:
        """Of a step that is in neither window."""
        return {
            "reason": reason,
            "loss": result.loss,
            "norm": result.grad_norm,
            "loss_mean": self._losses.mean,
            "loss_deviation": self._losses.std,
            "norm_mean": self._norms.mean,
            "norm_deviation": self._norms.std,
            "smoothed_loss": self._smoothed.mean,
            "best_smoothed_loss": self._smoothed.best,
        }

    # --- for a checkpoint -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """For `restore`, as JSON; None where nothing is watched."""
        if not self.watches:
            return None
        return {
            "losses": list(self._losses.values),
            "norms": list(self._norms.values),
            "smoothed": self._smoothed.state(),
            "in_a_row": self._in_a_row,
            "last_good": self._last_good,
            "has_said_climb": self._has_said_climb,
            "guarded_steps": self.guarded_steps,
        }

    def restore(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on after `step` from the state in its checkpoint; with nothing known where it has none."""
        self._begin(step)
        if state is None:
            return
        self._losses.values.extend(state["losses"])
        self._norms.values.extend(state["norms"])
        self._smoothed = replace(self._smoothed, **state["smoothed"])
        self._in_a_row, self._last_good = state["in_a_row"], state["last_good"]
        self._has_said_climb, self.guarded_steps = state["has_said_climb"], state["guarded_steps"]
