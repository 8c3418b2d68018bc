"""What trains, and the protocol of one optimizer step: built and followed here by the program, the simulation, the
benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config import ModelConfig
from megamoe.data.batches import Batch
from megamoe.ds_config import read_schedule
from megamoe.model.decoder import Decoder
from megamoe.topology import ExpertTopology
from megamoe.training.balancing import Balance, LoadBalancer
from megamoe.training.engine import build_engine


class TrainStep:
    """An engine with its balancer, and the order in which a step calls them. Every rank makes the same calls."""

    def __init__(self, engine: Any, balancer: LoadBalancer | None):
        """
        Args:
            engine: of `build_engine`.
            balancer: of the model's routers; None for a model without them.
        """
        self.engine = engine
        self.model = engine.module
        self.device: torch.device = engine.device
        self.balancer = balancer

    def forward_backward(self, batches: Iterable[Batch], passed: Callable[[str], None] = lambda phase: None) -> Tensor:
        """Run this rank's micro-batches of one step, as many as the engine accumulates; returns the mean of their
        losses, on the device.

        Args:
            passed: called after every "forward" and "backward".
        """
        total = torch.zeros((), device=self.device)
        for batch in batches:
            on_device = batch.to(self.device)
            loss = self.engine(on_device.input_ids, on_device.labels)
            passed("forward")
            self.engine.backward(loss)
            total += loss.detach()
            del loss
            passed("backward")
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()  # DeepSpeed counts micro-batches by this call; nothing is applied yet
        return total / self.engine.gradient_accumulation_steps()

    def update(self) -> Balance | None:
        """Apply the gradients and move the balancing bias. Returns what the balancer measured; None where DeepSpeed
        has skipped the step for a gradient that is not finite."""
        self.engine.step()
        applied = self.engine.was_step_applied()
        return self.balancer.step(applied) if self.balancer else None


def build_train_step(
    config: ModelConfig, ds: dict[str, Any], *, ep_size: int = 1, seed: int = 0, recompute_blocks: int = 0
) -> TrainStep:
    """Build model, engine and balancer on this rank of the process group.

    Args:
        ds: the DeepSpeed JSON, checked.
        seed: of the initial weights.
        recompute_blocks: of the model's first blocks, see `Decoder`.
    """
    topology = ExpertTopology(config.num_local_experts, ep_size, dist.get_world_size(), dist.get_rank())
    model = Decoder(config, seed, topology, recompute_blocks)
    engine = build_engine(model, ds, read_schedule(ds, "the DeepSpeed JSON"))
    return TrainStep(engine, balancer_of(model))


def balancer_of(model: Decoder) -> LoadBalancer:
    """The balancer of all routers of a model, by its configuration."""
    config = model.config
    return LoadBalancer(
        model.routers(),
        rate=config.router_bias_rate,
        rule=config.router_bias_rule,
        decay=config.router_load_decay,
    )
