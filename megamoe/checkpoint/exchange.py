"""What the ranks tell each other about a save: through the rendezvous' store, since a thread may call no collective."""

from __future__ import annotations

import json
import time
from typing import Any

from torch.distributed import HashStore, Store

PAUSE_SECONDS = 0.02  # between two looks into the store; longer with time
LONGEST_PAUSE_SECONDS = 0.5


class SaveExchange:
    """Rank 0 begins a save, every rank posts its part, rank 0 gathers them and concludes."""

    def __init__(self, store: Store | None, rank: int, world_size: int):
        """
        Args:
            store: that all ranks share; None for a single rank.
        """
        self._store = store or HashStore()
        self._rank = rank
        self._ranks = range(world_size)

    def begin(self, save: int, plan: Any) -> None:
        """Tell the others of save number `save`. On rank 0."""
        self._forget(save - 2)
        self._set(f"{save}/plan", plan)

    def plan(self, save: int) -> Any:
        """Wait for rank 0's plan of a save."""
        return self._wait([f"{save}/plan"])[0]

    def post(self, save: int, part: Any) -> None:
        """Give this rank's part."""
        self._set(f"{save}/part/{self._rank}", part)

    def gather(self, save: int) -> list[Any]:
        """Wait for the parts of all ranks. On rank 0."""
        return self._wait([f"{save}/part/{rank}" for rank in self._ranks])

    def conclude(self, save: int, outcome: Any) -> None:
        """Tell the others how it ended. On rank 0."""
        self._set(f"{save}/outcome", outcome)

    def outcome(self, save: int) -> Any:
        """Wait for the end of a save."""
        return self._wait([f"{save}/outcome"])[0]

    def _set(self, key: str, value: Any) -> None:
        self._store.set(f"save/{key}", json.dumps(value))

    def _wait(self, keys: list[str]) -> list[Any]:
        keys = [f"save/{key}" for key in keys]
        pause = PAUSE_SECONDS
        while not self._store.check(keys):  # a rank that died ends the job, see `launch/watch.py`
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        return [json.loads(self._store.get(key)) for key in keys]

    def _forget(self, save: int) -> None:
        """Remove what was said about a save before the last, which every rank has taken part in."""
        for key in (f"{save}/plan", f"{save}/outcome", *(f"{save}/part/{rank}" for rank in self._ranks)):
            self._store.delete_key(f"save/{key}")
