"""What trains, and the protocol of one optimizer step: built and followed here by the program, the simulation, the
benchmarks and the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import Recipe
from megamoe.config.run import Recompute
from megamoe.data.batches import Batch
from megamoe.launch.distributed import this_device
from megamoe.model.attention_kernels import activate_flash_attention
from megamoe.model.decoder import Decoder
from megamoe.model.topology import ExpertTopology
from megamoe.training.balancing import Balance, LoadBalancer
from megamoe.training.engine import build_engine
from megamoe.training.step_sums import NO_FLAGS, Flags, sum_over_ranks
from megamoe.training.weight_average import WeightAverage
from megamoe.training.weight_norms import weight_squares
from megamoe.training.zero_step import GivenNormOptimizer, norm_of

Skips = Callable[[float, float], bool]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step has come to, over all ranks."""

    loss: float  # mean cross-entropy, in nats
    parts: dict[str, float]  # means of the other parts of the training loss, by name and without coefficients
    grad_norm: float  # before clipping; infinite where a gradient is not finite
    applied: bool  # False where the update was skipped, for a gradient that is not finite or as a spike
    flags: Flags  # whether any rank has set them
    balance: Balance | None  # None if skipped, or without routers
    is_spike: bool = False  # it was skipped as one
    sources: Sequence[tuple[float, float]] = ()  # of each source: (sum of its tokens' nats, their number)
    weight_norms: dict[str, float] = field(default_factory=dict)  # before the update, by kind, where asked for


class TrainStep:
    """An engine with its balancer, and the order in which a step calls them. Every rank makes the same calls.

    A step is `forward_backward`, which gathers gradients, losses and the routers' counts, then `update`, which takes
    them: one all-reduce for all that is small, and one read by the host.
    """

    def __init__(self, engine: Any, balancer: LoadBalancer | None, average: WeightAverage | None = None):
        """
        Args:
            engine: of `build_engine`; its model sums up the parts of its loss in a buffer, as `Decoder` does.
            balancer: of the model's routers; None for a model without them.
            average: of the weights, which is updated with them; None keeps none.
        """
        self.engine = engine
        self.model = engine.module
        self.device: torch.device = engine.device
        self.balancer = balancer
        self.average = average

    def accumulate(self, micro_batches: int) -> None:
        """Make the next steps of so many micro-batches per rank each. Every rank, between two steps."""
        engine = self.engine
        if micro_batches == engine.gradient_accumulation_steps():
            return
        engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * dist.get_world_size())
        engine.micro_steps = 0  # a step ends where they are a multiple of the new number

    def forward_backward(self, batches: Iterable[Batch], passed: Callable[[str], None] = lambda phase: None) -> None:
        """Run this rank's micro-batches of one step, as many as the engine accumulates.

        Args:
            passed: called after every "forward" and "backward".
        """
        for batch in (one.to(self.device) for one in batches):
            loss = self.engine(batch.input_ids, batch.labels, documents=batch.documents, sources=batch.sources)
            passed("forward")
            self.engine.backward(loss)
            del loss
            passed("backward")
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()  # DeepSpeed counts micro-batches by this call; nothing is applied yet

    def update(self, flags: Flags = NO_FLAGS, skips: Skips | None = None, weight_norms: bool = False) -> StepResult:
        """Apply the gradients, clipped, and move the balancing bias; or skip both where a gradient is not finite, or
        the step is a spike. Collective, after `forward_backward` of this step.

        Args:
            flags: of this rank.
            skips: whether a step with this loss and this norm, which all ranks have alike, is to be skipped as a spike;
                a pure function.
            weight_norms: compute them; all ranks alike.
        """
        optimizer = self.engine.optimizer
        takes_norm = isinstance(optimizer, GivenNormOptimizer)  # else it is offloaded and reads its own
        losses = self.model.step_losses
        counts = self.balancer.take_counts() if self.balancer else losses.new_zeros(0, 0)
        entropies = self.model.take_entropies() if self.balancer else losses.new_zeros(0)
        margins = self.balancer.take_margins() if self.balancer else losses.new_zeros(0)
        squares = optimizer.sum_of_squares() if takes_norm else 0.0
        small, weights = losses.flatten(), weight_squares(self.engine) if weight_norms else {}
        if weights:
            small = torch.cat((small, torch.stack(list(weights.values())).to(self.device)))
        sums = sum_over_ranks(squares, small, flags, counts, entropies, margins)
        losses.zero_()
        running = self.balancer.next_loads(sums.counts) if self.balancer else counts
        on_host = sums.read(running)

        parts, summed = len(self.model.loss_parts), on_host.losses[: losses.numel()]
        pairs = list(zip(summed[::2], summed[1::2], strict=True))
        loss, *others = (total / (share or 1) for total, share in pairs[:parts])
        if takes_norm:
            optimizer.give_norm(norm_of(on_host.squares))
        optimizer.is_spike = partial(skips, loss) if skips else None
        self.engine.step()
        is_spike = optimizer.spike is not None
        self.engine.skipped_steps -= is_spike  # of steps whose gradients are not finite
        applied = self.engine.was_step_applied()
        balance = None
        if self.balancer and applied:
            self.balancer.apply(running, sums.margins)
            chosen = self.model.config.num_experts_per_tok
            entropies = [total * chosen / slots for total, slots in zip(on_host.entropies, on_host.slots, strict=True)]
            balance = Balance(on_host.counts, on_host.running_loads, entropies)
        if self.average and applied:
            self.average.update()
        return StepResult(
            loss=loss,
            parts=dict(zip(self.model.loss_parts[1:], others, strict=True)),
            grad_norm=float(optimizer.spike if is_spike else self.engine.get_global_grad_norm()),
            applied=applied,
            flags=on_host.flags,
            balance=balance,
            is_spike=is_spike,
            sources=pairs[parts:],
            weight_norms=dict(zip(weights, map(math.sqrt, on_host.losses[losses.numel() :]), strict=True)),
        )


def build_train_step(
    config: ModelConfig,
    recipe: Recipe,
    *,
    ep_size: int = 1,
    seed: int = 0,
    recompute_blocks: int = 0,
    recompute: Recompute = "whole",
    compiled: bool = False,
    ema_decay: float | None = None,
    num_sources: int = 0,
) -> TrainStep:
    """Build model, engine and balancer on this rank of the process group.

    Args:
        seed: of the initial weights.
        recompute_blocks: of the model's first blocks, and what of them, see `Decoder`.
        compiled: train by compiled blocks, see `Decoder.compile_blocks`.
        ema_decay: of the average of the weights, see `WeightAverage`; None keeps none.
        num_sources: of samples whose losses are kept apart.
    """
    topology = ExpertTopology(config.num_local_experts, ep_size, dist.get_world_size(), dist.get_rank())
    model = Decoder(config, seed, topology, recompute_blocks, recompute, num_sources)
    if compiled:
        model.compile_blocks()
    activate_flash_attention(config, this_device())
    engine = build_engine(model, recipe)
    average = None if ema_decay is None else WeightAverage(engine, ema_decay)
    return TrainStep(engine, balancer_of(model), average)


def balancer_of(model: Decoder) -> LoadBalancer:
    """The balancer of all routers of a model, by its configuration."""
    config = model.config
    return LoadBalancer(
        model.routers(),
        rate=config.router_bias_rate,
        rule=config.router_bias_rule,
        decay=config.router_load_decay,
    )
