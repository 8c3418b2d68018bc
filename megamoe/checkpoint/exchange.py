"""What the ranks tell each other about a save: through the rendezvous' store, since a thread may call no collective."""

from __future__ import annotations

import json
import time
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store

PIECE_BYTES = 1 << 20  # the store breaks a connection over values of 8 MiB
PAUSE_SECONDS = 0.02  # between two looks into the store; longer with time
LONGEST_PAUSE_SECONDS = 0.5


class SaveExchange:
    """Rank 0 begins a save, every rank posts its part, rank 0 gathers them and concludes."""

    def __init__(self, store: Store | None, rank: int, world_size: int):
        """
        Args:
            store: that all ranks share; None for a single rank.
        """
        store = store or HashStore()
        number = store.add(f"exchange/{rank}", 1)  # the same on every rank, for each makes the same ones
        self._store = PrefixStore(f"exchange/{number}", store)
        self._rank = rank
        self._ranks = range(world_size)

    def begin(self, save: int, plan: Any) -> None:
        """Tell the others of save number `save`. On rank 0."""
        if save > 2:  # every rank has taken part in the one before, and is done with that
            self._delete(f"{save - 2}/plan")
            self._delete(f"{save - 2}/outcome")
        self._set(f"{save}/plan", plan)

    def plan(self, save: int) -> Any:
        """Wait for rank 0's plan of a save."""
        return self._wait([f"{save}/plan"])[0]

    def post(self, save: int, part: Any) -> None:
        """Give this rank's part."""
        self._set(f"{save}/part/{self._rank}", part)

    def gather(self, save: int) -> list[Any]:
        """Wait for the parts of all ranks. On rank 0."""
        keys = [f"{save}/part/{rank}" for rank in self._ranks]
        parts = self._wait(keys)
        for key in keys:
            self._delete(key)
        return parts

    def conclude(self, save: int, outcome: Any) -> None:
        """Tell the others how it ended. On rank 0."""
        self._set(f"{save}/outcome", outcome)

    def outcome(self, save: int) -> Any:
        """Wait for the end of a save."""
        return self._wait([f"{save}/outcome"])[0]

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value)
        pieces = [text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{key}/{number}", piece)
        self._store.set(key, str(len(pieces)))

    def _get(self, key: str) -> Any:
        count = int(self._store.get(key))
        return json.loads("".join(self._store.get(f"{key}/{number}").decode() for number in range(count)))

    def _delete(self, key: str) -> None:
        for number in range(int(self._store.get(key))):
            self._store.delete_key(f"{key}/{number}")
        self._store.delete_key(key)

    def _wait(self, keys: list[str]) -> list[Any]:
        pause = PAUSE_SECONDS
        while not self._store.check(keys):  # a rank that died ends the job, see `launch/watch.py`
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        return [self._get(key) for key in keys]
