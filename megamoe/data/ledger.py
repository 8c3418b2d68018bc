"""Which data a step reads, after a run has gone back and passed over some: RUN/data_ledger.json.

Each step reads the data of step + offset. Going back raises the offset, so that no data is read again, and every later
resume of the run follows, on any number of ranks.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megamoe.config.model import JsonModel, validate
from megamoe.utils import disk
from megamoe.utils.json_files import read_json

NAME = "data_ledger.json"


class Entry(JsonModel):
    """One return of a run to an older checkpoint."""

    after_step: int = Field(ge=0)
    """Step of the checkpoint."""
    offset: int = Field(ge=0)
    """Between a later step and that whose data it reads."""
    generation: int = Field(ge=0)
    """Of the checkpoints since, see `checkpoint/folders.py`: those of lower ones behind `after_step` are left."""


class DataLedger(JsonModel):
    """The returns of a run that still count, by their steps."""

    rollbacks: int = Field(default=0, ge=0)
    """All of them."""
    entries: list[Entry] = Field(default=[])

    def data_step(self, step: int) -> int:
        """The step whose data `step` reads."""
        return step + next((entry.offset for entry in reversed(self.entries) if entry.after_step < step), 0)

    def gone_back(self, after_step: int, last_read: int, generation: int) -> DataLedger:
        """The ledger of a run that has returned to `after_step`, and goes on with the data behind that of `last_read`.

        Args:
            last_read: data step.
            generation: of the checkpoints to come.
        """
        kept = [entry for entry in self.entries if entry.after_step < after_step]
        entry = Entry(after_step=after_step, offset=last_read - after_step, generation=generation)
        return DataLedger(rollbacks=self.rollbacks + 1, entries=[*kept, entry])

    def has_left(self, step: int, generation: int) -> bool:
        """Whether the run has gone back from the checkpoint of that step and generation."""
        return any(generation < entry.generation and step > entry.after_step for entry in self.entries)

    @property
    def generation(self) -> int:
        """The least of the checkpoints to come."""
        return max((entry.generation for entry in self.entries), default=0)

    def write(self, run_dir: Path) -> None:
        """Put it into a run folder, atomically. Raises OSError."""
        disk.replace_file(run_dir / NAME, self.model_dump_json(indent=2) + "\n")


def read_ledger(run_dir: Path) -> DataLedger:
    """That of a run folder; an empty one where the run has never gone back. Raises UserError."""
    path = run_dir / NAME
    return validate(DataLedger, read_json(path), str(path)) if path.exists() else DataLedger()
