"""What one rank of a job takes in a step, measured on this CPU, next to what the planner predicts of it.

    python tools/dev/simulate.py --gpus 1024 --ep_size 8 --ds_config ds_configs/zero2.json

The options are those of tools/plan.py. The real model and engine run under torch's fake process group, whose
collectives return at once and move nothing: shapes, memory and payloads are those of the real job, values are not.
Every peer seems to send what this rank sends.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megamoe.commands.plan import PlanCommand, plan_of
from megamoe.config import cli
from megamoe.config.model import ModelConfig
from megamoe.config.recipe import Recipe, parse_recipe
from megamoe.config.run import Recompute
from megamoe.data.batches import Batch
from megamoe.launch.distributed import configure_deepspeed
from megamoe.planning.footprint import footprint
from megamoe.planning.meter import LiveBytes
from megamoe.planning.report import totals
from megamoe.planning.sharding import Setup
from megamoe.planning.traffic import payload_of
from megamoe.training.collectives import Collectives
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
    recompute: Recompute = "whole",
) -> Measured:
    """Train two steps on random tokens, the first of which makes the optimizer's state, and measure the second."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    ahead = config.num_nextn_predict_layers
    with LiveBytes() as live:
        train_step = build_train_step(
            config, recipe, ep_size=ep_size, recompute_blocks=recompute_blocks, recompute=recompute, ema_decay=ema_decay
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
        with mock.patch.object(dist, "all_to_all_single", echo_of(dist.all_to_all_single)):
            yield
    finally:
        dist.destroy_process_group()


def echo_of(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """An all-to-all that moves nothing, made to receive what it sends where that is as much."""

    def echo(received: Tensor, sent: Tensor, *args: Any, **options: Any) -> Any:
        work = all_to_all(received, sent, *args, **options)
        if received.shape == sent.shape:
            with _disable_current_modes():
                received.copy_(sent)
        return work

    return echo


def simulate(setup: Setup, recipe: Recipe, ema_decay: float | None = None) -> dict[str, tuple[int, int]]:
    """(predicted, measured) bytes of rank 0 alone by phase, and its payload by kind of collective and ranks of its
    group. The process can join no other group afterwards."""
    setup = replace(setup, on_cpu=True, kernel="grouped_mm", imbalance=1.0)  # every peer sends what this rank sends
    recipe = parse_recipe(recipe.written, recipe.where, recipe.world_size, on_cpu=True, auto=recipe.auto)
    with one_rank_of(recipe.world_size):
        recomputed = setup.recompute_blocks, ema_decay, setup.recompute
        measured = measure(setup.model, recipe, setup.ep_size, setup.seq_len, *recomputed)
    sizes = {name: (size, getattr(measured, name)) for name, size in totals(footprint(setup)).items()}
    payload = payload_of(setup)
    kinds = sorted(payload.keys() | measured.payload.keys())
    return sizes | {
        f"{kind} over {ranks}": (payload[kind, ranks], measured.payload[kind, ranks]) for kind, ranks in kinds
    }


def main(options: PlanCommand) -> None:
    plan = plan_of(options)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints as it starts
        found = simulate(plan.setup, plan.recipe, plan.run.ema_decay)
    print(f"rank 0 of {plan.setup.world_size}, run alone on this CPU")
    print(f"  {'bytes; on CPU, activations differ':38s}{'predicted':>16s}{'measured':>16s}")
    for name, (predicted, measured) in found.items():
        off = predicted / measured - 1 if measured else float(predicted > 0)
        print(f"  {name:38s}{predicted:16,d}{measured:16,d}  {off:+.2%}")


if __name__ == "__main__":
    app = cli.make_app("simulate.py")
    app.default(main)
    cli.run(lambda: cli.parse(app, sys.argv[1:])())
