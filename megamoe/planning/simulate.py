"""One real training step, measured: the real model and engine on this rank of whatever process group there is.

With torch's fake process group, whose collectives return at once and move nothing, that is one rank of a job of any
size, alone on this machine: shapes, memory and payloads are those of the real job, values are not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import Recipe
from megamoe.data.batches import Batch
from megamoe.launch.distributed import configure_deepspeed
from megamoe.planning.meter import Collectives, LiveBytes
from megamoe.training.step import build_train_step


@dataclass(frozen=True)
class Measured:
    """Bytes of live tensors on this rank, and payload of its collectives in one step."""

    between: int  # between two steps
    forward: int  # at the peak of the forward passes
    backward: int
    step: int  # of the optimizer's step
    payload: Counter[tuple[str, int]]  # bytes by kind and ranks of the group

    @property
    def peak(self) -> int:
        """At the peak of the step."""
        return max(self.forward, self.backward, self.step)


def measure(
    config: ModelConfig,
    recipe: Recipe,
    ep_size: int,
    seq_len: int,
    recompute_blocks: int = 0,
    ema_decay: float | None = None,
) -> Measured:
    """Train two steps on random tokens, the first of which makes the optimizer's state, and measure the second."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    ahead = config.num_nextn_predict_layers
    with LiveBytes() as live:
        train_step = build_train_step(
            config, recipe, ep_size=ep_size, recompute_blocks=recompute_blocks, ema_decay=ema_decay
        )
        ids, labels = (
            torch.randint(config.vocab_size, (recipe.micro_batch, length), generator=generator)
            for length in (seq_len, seq_len + ahead)
        )
        batch = Batch(ids, labels)
        for _ in range(2):
            peaks = Counter[str]()

            def passed(phase: str, peaks: Counter[str] = peaks) -> None:
                peaks[phase] = max(peaks[phase], live.peak)
                live.restart()

            between = live.now
            live.restart()
            with Collectives() as collectives:
                train_step.forward_backward([batch] * recipe.accumulation, passed)
                train_step.update()
                passed("step")
    return Measured(between, peaks["forward"], peaks["backward"], peaks["step"], collectives.payload)


@contextmanager
def one_rank_of(world_size: int) -> Iterator[None]:
    """Makes this process rank 0 of a job whose other ranks do not exist; it can join no other group afterwards."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    configure_deepspeed()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate(
    config: ModelConfig,
    recipe: Recipe,
    ep_size: int,
    seq_len: int,
    recompute_blocks: int = 0,
    ema_decay: float | None = None,
) -> Measured:
    """Measure rank 0 of the recipe's ranks alone, on this CPU. The process can join no other group afterwards.

    Every peer seems to send what this rank sends, so the experts of this rank get as many rows as the rank sends away.
    """
    with one_rank_of(recipe.world_size):
        return measure(config, recipe, ep_size, seq_len, recompute_blocks, ema_decay)
