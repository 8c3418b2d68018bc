"""One real training step, measured: the real model and engine on this rank of whatever process group there is.

With torch's fake process group, whose collectives return at once and move nothing, that is one rank of a job of any
size, alone on this machine: shapes, memory and payloads are those of the real job, values are not.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamoe.config import ModelConfig
from megamoe.ds_config import batch_sizes, read_schedule
from megamoe.model.decoder import Decoder
from megamoe.planning.meter import Collectives, LiveBytes
from megamoe.topology import ExpertTopology
from megamoe.training.balancing import LoadBalancer
from megamoe.training.distributed import quiet
from megamoe.training.engine import build_engine


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


def measure(config: ModelConfig, ds: dict[str, Any], ep_size: int, seq_len: int, recompute_blocks: int = 0) -> Measured:
    """Train two steps on random tokens, the first of which makes the optimizer's state, and measure the second.

    Args:
        ds: the DeepSpeed JSON, checked.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro_batch, accumulation = batch_sizes(ds, world_size)
    generator = torch.Generator().manual_seed(rank)
    topology = ExpertTopology(config.num_local_experts, ep_size, world_size, rank)
    with LiveBytes() as live:
        model = Decoder(config, 0, ep_size, topology.ep_rank, recompute_blocks)
        engine = build_engine(model, ds, read_schedule(ds, "the DeepSpeed JSON"))
        balancer = LoadBalancer(
            model.routers(), config.router_bias_rate, config.router_bias_rule, config.router_load_decay
        )
        input_ids, labels = torch.randint(config.vocab_size, (2, micro_batch, seq_len), generator=generator).unbind()
        for _ in range(2):
            peaks = Counter[str]()

            def passed(phase: str, peaks: Counter[str] = peaks) -> None:
                peaks[phase] = max(peaks[phase], live.peak)
                live.restart()

            between = live.now
            live.restart()
            with Collectives() as collectives:
                for micro in range(accumulation):
                    loss = engine(input_ids, labels)
                    passed("forward")
                    engine.backward(loss)
                    del loss
                    passed("backward")
                    if micro < accumulation - 1:
                        engine.step()
                engine.step()
                balancer.step(engine.was_step_applied())
                passed("step")
    return Measured(between, peaks["forward"], peaks["backward"], peaks["step"], collectives.payload)


def simulate(
    config: ModelConfig, ds: dict[str, Any], world_size: int, ep_size: int, seq_len: int, recompute_blocks: int = 0
) -> Measured:
    """Measure rank 0 of `world_size` alone, on this machine's CPU. The process can join no other group afterwards.

    Every peer seems to send what this rank sends, so the experts of this rank get as many rows as the rank sends away.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # LOCAL_SIZE as of several machines, or DeepSpeed would wait for the others' shared memory.
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_SIZE="0",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # fmt: skip
    quiet()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        return measure(config, ds, ep_size, seq_len, recompute_blocks)
    finally:
        dist.destroy_process_group()
