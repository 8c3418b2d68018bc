"""Steps that were skipped because a gradient was not finite: a run that does nothing else has diverged."""

from __future__ import annotations

WARN_AFTER = 3  # in a row
END_AFTER = 20


class SkippedSteps:
    """Counts them, in a row and since the last save."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._since_save = 0

    def count(self, was_applied: bool) -> None:
        """Count one step. One that only lowers a dynamic loss scale, as fp16 needs now and then, counts as applied."""
        self._in_a_row = 0 if was_applied else self._in_a_row + 1
        self._since_save += not was_applied

    def take(self) -> int:
        """How many since the last call, for the save that begins."""
        count, self._since_save = self._since_save, 0
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
