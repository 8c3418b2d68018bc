"""Which of a run's checkpoints stay, and which it has gone back from."""

from __future__ import annotations

import sys
from pathlib import Path

from megamoe.checkpoint import folders
from megamoe.checkpoint.folders import Age
from megamoe.checkpoint.index import read_index
from megamoe.data.ledger import DataLedger
from megamoe.utils.errors import UserError


class Retention:
    """The checkpoints in RUN/checkpoints, as a run that trains sees them. On rank 0."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int, resumed: Path | None, ledger: DataLedger):
        """
        Args:
            keep_last: newest checkpoints that stay; 0 keeps all.
            keep_every: checkpoints at multiples of this many steps stay too.
            resumed: the checkpoint that the run resumes from.
            ledger: of the run.
        """
        self._folder = folder
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._generation = ledger.generation
        followed = folders.run_checkpoints(folder, ledger)
        self.left_behind = {path for path in folders.step_folders(folder) if path not in followed}
        """Checkpoints that the run has gone back from: they stay, and are not used again."""
        self._skipped: dict[str, int] = {}  # steps of each checkpoint's window
        self.go_back(resumed)

    def go_back(self, checkpoint: Path | None) -> int:
        """Leave behind what is newer than `checkpoint`, or all where there is none; returns the generation of
        the checkpoints to come."""
        found = folders.step_folders(self._folder)
        if found and (newest := folders.age_of(found[0])):
            self._generation = max(self._generation, newest.generation + (found[0] != checkpoint))
        self.left_behind |= set(found[: found.index(checkpoint)] if checkpoint in found else found)
        return self._generation

    def path_of(self, step: int) -> Path:
        """The folder of the checkpoint to come after a step."""
        return self._folder / folders.name_of(Age(self._generation, step))

    def add(self, checkpoint: Path, skipped: int) -> None:
        """Count a checkpoint that has been saved.

        Args:
            skipped: steps since the save before whose gradients were not finite.
        """
        self._skipped[checkpoint.name] = skipped

    def prune(self, good_until: int | None) -> None:
        """Remove what need not stay; says where that fails.

        Args:
            good_until: the last step whose checkpoint the run might go back to; None where it does not.
        """
        if not self._keep_last:
            return
        try:
            found = [path for path in folders.checkpoints(self._folder) if path not in self.left_behind]
            kept, rest = found[: self._keep_last], found[self._keep_last :]
            spared = None  # the newest to go back to, where no kept one is
            if rest and not any(self._is_good(path, good_until) for path in kept):
                spared = next((path for path in rest if self._is_good(path, good_until)), None)
            for path in rest:
                is_one_of_every = self._keep_every and (folders.step_of(path) or 0) % self._keep_every == 0
                if path != spared and not is_one_of_every:
                    folders.discard(path)
        except OSError as error:
            print(f"error: old checkpoints in {self._folder} cannot be removed ({error}).", file=sys.stderr, flush=True)

    def _is_good(self, checkpoint: Path, good_until: int | None) -> bool:
        """Whether no step of its window was skipped for a gradient that is not finite, and the run might go back to
        it."""
        step = folders.step_of(checkpoint)
        if good_until is not None and step is not None and step > good_until:
            return False
        if checkpoint.name not in self._skipped and folders.has_index(checkpoint):
            try:
                self._skipped[checkpoint.name] = read_index(checkpoint).training.skipped_in_window
            except UserError:
                return False
        return self._skipped.get(checkpoint.name, 0) == 0  # other forms do not say
