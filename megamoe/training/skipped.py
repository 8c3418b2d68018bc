"""Steps that were skipped because a gradient was not finite: a run that does nothing else has diverged."""

from __future__ import annotations

WARN_AFTER = 3  # in a row
END_AFTER = 20


class SkippedSteps:
    """Counts them, in a row and since the last save."""

    def __init__(self, lowers_scale: bool):
        """
        Args:
            lowers_scale: a skipped step lowers a dynamic loss scale, as fp16 needs now and then; such steps do not
                count. DeepSpeed itself ends a run whose scale cannot be lowered any more.
        """
        self._counts = not lowers_scale
        self._in_a_row = 0
        self._in_window = 0

    def count(self, was_applied: bool) -> None:
        """Count one step."""
        if self._counts and not was_applied:
            self._in_a_row += 1
            self._in_window += 1
        else:
            self._in_a_row = 0

    def take_window(self) -> int:
        """Steps skipped since the last call."""
        count, self._in_window = self._in_window, 0
        return count

    def warning(self) -> str | None:
        """What to say of them now, if anything."""
        if self._in_a_row != WARN_AFTER:
            return None
        return f"the last {WARN_AFTER} steps were skipped, for their gradients are not finite"

    def error(self) -> str | None:
        """Why the run must end, if it must."""
        if self._in_a_row < END_AFTER:
            return None
        return (
            f"the last {END_AFTER} steps were skipped, for their gradients are not finite: training has diverged; "
            "lower the peak learning rate, or look at the data, and resume from a checkpoint before"
        )
