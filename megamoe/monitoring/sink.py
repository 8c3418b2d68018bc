"""What takes a run's values: on rank 0, one object for each place that they go to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # `megamoe status` reads a log without it
    from torch import Tensor


class Sample(NamedTuple):
    """A text that the model has written."""

    prompt: str
    continuation: str


class Sink:
    """What a sink can take; each method does nothing unless a sink overrides it. Sinks exist on rank 0 only."""

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        """Begin to write.

        Args:
            first_step: the step that the run continues from; what was logged after it is superseded.
            record: of the run, as in run.json.
        """

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Numbers by name: of a logged training step (kind "train", see `StepMetrics.values`) or of an evaluation
        (kind "valid": loss, tokens and, where the corpus' bytes are known, bits_per_byte of the first held-out set,
        NAME_loss and NAME_bits_per_byte of the others; the same of the averaged weights, where a run keeps them, behind
        ema_; TASK_METRIC. An evaluation need not have all.)"""

    def log_text(self, step: int, text: str) -> None:
        """A line about the run itself."""

    def log_expert_loads(self, step: int, blocks: list[int], counts: Tensor) -> None:
        """Slots that a step routed to each expert, over all ranks.

        Args:
            blocks: the L blocks that have experts, by number from 0.
            counts: (L, E) int64.
        """

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        """What the model writes after a step."""

    def log_event(self, event: str, step: int, values: dict[str, Any]) -> None:
        """What happens to the run, and what belongs to it: docs/reference/log.md lists the events."""

    def go_back(self, step: int) -> None:
        """The run goes back to `step`; what was logged after it is superseded."""

    def close(self) -> None:
        """Write what is left."""
