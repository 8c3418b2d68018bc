"""One model on all ranks, driven by rank 0: every forward pass is of all ranks, each with its share of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamoe.evaluation.scoring import Share, Window, score
from megamoe.launch.distributed import on_any_rank
from megamoe.model.decoder import Decoder
from megamoe.model.generation import generate


@dataclass
class SharedModel:
    """Rank 0 says by `work_on` what it does, calls `score` and `generate`, then `release`; the others are in `follow`
    meanwhile."""

    model: Decoder
    share: Share
    device: torch.device
    report: Callable[..., None] = lambda *_, **__: None  # is told where this rank is, as `Position.at` is
    has_failed: bool = False  # in a call of all ranks
    _activity: str = "evaluation"

    def work_on(self, activity: str) -> None:
        """Rank 0 works on `activity`, by itself but for its calls of all ranks."""
        self._activity = activity
        self.report(activity, alone=True)

    def score(self, windows: Sequence[Window], owners: int) -> list[list[float]]:
        """Sums of nats, tokens, and tokens of which another was more likely, of each owner: see `scoring.score`."""
        return self._call("score", windows, owners)

    def generate(self, prompts: list[list[int]], new_tokens: int, options: dict[str, Any]) -> list[list[int]]:
        """The new token ids of each prompt.

        Args:
            options: of `generation.generate`.
        """
        return self._call("generate", prompts, new_tokens, options)

    def release(self) -> None:
        """Let the other ranks go on."""
        self.report(self._activity)
        if not self.has_failed:
            self._send(None)

    def follow(self) -> None:
        """Take part in what rank 0 calls, until it releases this rank."""
        while (call := self._send(None)) is not None:
            self._take_part(*call)

    def _call(self, *call: Any) -> Any:
        self.has_failed = True  # until it has not: an error leaves the other ranks in the middle of a collective
        self.report(self._activity)
        self._send(call)
        result = self._take_part(*call)
        self.has_failed = False
        self.work_on(self._activity)
        return result

    def _send(self, call: Any) -> Any:
        """What rank 0 gives here, on every rank."""
        calls = [call]
        if self.share.world_size > 1:
            dist.broadcast_object_list(calls)
        return calls[0]

    def _take_part(self, name: str, *args: Any) -> Any:
        if name == "score":
            windows, owners = args
            return score(self.model, windows, owners, self.share, self.device).tolist()
        return self._generate(*args)

    def _generate(self, prompts: list[list[int]], new_tokens: int, options: dict[str, Any]) -> list[list[int]]:
        rows: list[list[int]] = []
        micro_batch, rank, world_size = self.share
        for first in range(0, len(prompts), micro_batch * world_size):
            shares = [
                prompts[start : start + micro_batch]
                for start in range(first, first + micro_batch * world_size, micro_batch)
            ]
            # A rank without a prompt goes along: the others' tokens need its experts.
            made = generate(self.model, shares[rank] or [[0]], new_tokens, all_done=self._on_all_ranks, **options)
            of_ranks: list[Any] = [made] * world_size
            if world_size > 1:
                dist.all_gather_object(of_ranks, made)
            rows += [row for of_rank, share in zip(of_ranks, shares, strict=True) for row in of_rank[: len(share)]]
        return rows

    def _on_all_ranks(self, flag: bool) -> bool:
        if self.share.world_size == 1:
            return flag
        return not on_any_rank(not flag, device=self.device)[0]
