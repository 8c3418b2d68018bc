"""Predicted time of a training step: phases one after the other, and what limits each.

In a phase the host gives the device operators while the device runs those before: the phase takes the longer of both.
A CPU is its own host, so there both add up.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megamoe.model.costs import train_flops_per_token
from megamoe.model.loss import loss_chunk
from megamoe.planning.model_trace import Trace, model_trace
from megamoe.planning.overlap import buckets, seconds_not_hidden
from megamoe.planning.rates import KERNEL, Rates, attention_seconds, gemm_seconds
from megamoe.planning.sharding import Setup, parameter_groups
from megamoe.planning.traffic import PhaseName, collectives, host_transfers, update_bytes
from megamoe.planning.work import Gemm, Work
from megamoe.training.matrix_share import Run
from megamoe.training.muon import NEWTON_SCHULZ_STEPS
from megamoe.utils.data_sheets import Device

Part = Literal[
    "launches",
    "waits",
    "gemms",
    "attention",
    "memory",
    "copies",
    "exchange",
    "gradients",
    "optimizer",
    "weights",
    "transfers",
]

Parts = dict[Part, float]  # seconds


def added(*parts: Parts) -> Parts:
    """All of them, without what takes no time."""
    kinds = dict.fromkeys(kind for one in parts for kind in one)
    sums = {kind: sum(one.get(kind, 0.0) for one in parts) for kind in kinds}
    return {kind: seconds for kind, seconds in sums.items() if seconds}


# What is left of a block's operators where it is compiled, which a trace does not show: in `moe-680m` 66 of 97, with an
# all-to-all 95 of 130 (docs/results/performance.md counts layers). And of their bytes, where each compiled region reads
# its inputs once and writes its results once: derived by hand, not counted yet.
COMPILED_OPERATORS, COMPILED_BYTES = {"forward": 0.65, "backward": 0.78}, 0.5

ENGINE_OPERATORS = 11  # of DeepSpeed in a micro-batch besides those of each gradient
UPDATE_OPERATORS = 51  # of the optimizer, clipping and balancing
MUON_OPERATORS = 6 + 3 * NEWTON_SCHULZ_STEPS  # for each batch of matrices


def gradient_operators(setup: Setup, reduced: bool) -> int:
    """Operators for each gradient that DeepSpeed gathers: to its bucket, and from there to where it is kept. If it is
    `reduced` and summed in fp32, it is copied back first, and cast after a reduction in another precision. One that is
    reduced once is only added."""
    if setup.reduces_once:
        return 1
    return 2 + (reduced and setup.sums_apart) * (1 + (setup.communication_bytes < 4))


def gradient_bytes(setup: Setup, reduced: bool, whole: int, owned: int) -> float:
    """Bytes that DeepSpeed reads and writes to gather the gradients of a backward pass. Those that are reduced once are
    added to sums, which in a step begin as zeros, are divided, and copied to be reduced in another precision.

    Args:
        reduced: whether other ranks have the same parameters: see `Setup.reduces`.
        whole: weights on this rank, whose gradients go to a bucket and are divided; to be reduced, they go to a flat
            copy, and to another precision and back if they are reduced in one.
        owned: weights of the rank's share, copied back if reduced; then added to sums in fp32, which begin as
            zeros, or copied once more.
    """
    s, wire, total = setup.weight_bytes, setup.communication_bytes, setup.sum_bytes
    if setup.reduces_once:
        of_step = 3 * total + (total + wire) * (reduced and wire != total)
        return whole * (s + 2 * total + of_step / setup.accumulation)
    if not reduced:
        return 4 * s * whole + (s + 12 if setup.sums_apart else 2 * s) * owned
    of_whole = 6 * s + (2 * (s + wire) if wire != s else 0)
    summed = 16 + (wire + 4 if wire < 4 else 0)
    return of_whole * whole + (s + wire + (summed if setup.sums_apart else 2 * s)) * owned


def newton_schulz(run: Run) -> list[Gemm]:
    """The GEMMs of a Newton-Schulz step: each matrix with its transpose, that with itself, and that with the matrix."""
    small, large = sorted((run.rows, run.columns))
    sizes = ((small, small, large), (small, small, small), (small, large, small))
    return [Gemm(*size, groups=run.count) for size in sizes]


@dataclass(frozen=True)
class Phase:
    """A part of a step, in seconds."""

    name: str
    launches: float  # of the host
    device: Parts  # what the device does or waits for
    waits: float = 0.0  # the device, for the host
    is_serial: bool = False  # the device is the host

    @property
    def device_seconds(self) -> float:
        return sum(self.device.values())

    @property
    def parts(self) -> Parts:
        """The phase's seconds by what decides them."""
        is_host_bound = self.launches > self.device_seconds
        launches: Parts = {"launches": self.launches if self.is_serial or is_host_bound else 0.0, "waits": self.waits}
        return added(launches, self.device if self.is_serial or not is_host_bound else {})

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def limit(self) -> Part | None:
        """What takes most of it; None where it takes no time."""
        return max(self.parts, key=self.parts.__getitem__, default=None)


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step."""

    phases: list[Phase]
    tokens: int  # in a step over all ranks
    mfu: float

    @property
    def parts(self) -> Parts:
        return added(*(phase.parts for phase in self.phases))

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def limit(self) -> Part:
        """What takes most of the step."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(setup: Setup, device: Device, gpus_per_node: int, rates: Rates) -> StepTime:
    """Predicted time of a step on `device`."""
    return _Step(setup, device, gpus_per_node, rates).time()


class _Step:
    """The arithmetic of one step; what its methods return is for all of the step's micro-batches."""

    def __init__(self, setup: Setup, device: Device, gpus_per_node: int, rates: Rates):
        self.setup, self.device, self.rates = setup, device, rates
        self.groups = parameter_groups(setup)
        self.trace = model_trace(replace(setup, imbalance=1.0))
        self.blocks = list(self.trace.blocks.values())
        self.collectives = dict.fromkeys(get_args(PhaseName), 0.0)  # seconds
        hidden = dict.fromkeys(self.collectives, 0.0)
        for one in collectives(setup):
            seconds = one.seconds(device, gpus_per_node, rates.links)
            (hidden if one.is_hidden else self.collectives)[one.phase] += seconds
        for phase, seconds in hidden.items():
            self.collectives[phase] += max(seconds - self.meanwhile(phase), 0.0)

    def time(self) -> StepTime:
        setup = self.setup
        backward = self.backward()
        phases = [self.forward(), self.loss(), backward, self.reduction(backward.seconds)]
        phases.append(self.update())
        tokens = setup.tokens * setup.accumulation
        flops = train_flops_per_token(setup.model, setup.seq_len) * tokens
        peak = self.device.mfu_peak(setup.weight_bytes)
        seconds = sum(phase.seconds for phase in phases)
        return StepTime(phases, tokens * setup.world_size, flops / (seconds * peak))

    def forward(self) -> Phase:
        work = self.trace.around.work["forward"] + self.work(self.blocks, "forward")
        # The recomputed blocks' exchange is counted here too.
        device = added(self.device_parts(work), {"exchange": self.collectives["forward"]})
        return self.phase("forward", work.operators, device, work.waits, self.regions(self.blocks))

    def meanwhile(self, phase: str) -> float:
        """Seconds of what the device computes while rows are exchanged. A CPU exchanges them itself."""
        if self.setup.on_cpu:
            return 0.0
        return sum(self.device_parts(sum((block.meanwhile[phase] for block in self.blocks), Work())).values())

    def work(self, blocks: list[Trace], phase: str) -> Work:
        """Of these blocks."""
        total = sum((block.work[phase] for block in blocks), Work())
        if not self.setup.compiled:
            return total
        operators = COMPILED_OPERATORS[phase] * total.operators
        return replace(total, operators=operators, bytes=COMPILED_BYTES * total.bytes)

    def regions(self, blocks: list[Trace]) -> int:
        """Compiled regions that the host calls in one pass of these blocks: around the experts, and between the
        GEMMs of gated ones; one of a dense block."""
        of_sparse = 2 + self.setup.model.gated_mlp
        return self.setup.compiled * sum(1 if block.is_dense else of_sparse for block in blocks)

    def loss(self) -> Phase:
        """What follows the blocks: head and loss, with their gradients; of multi-token prediction all but its block."""
        setup, work = self.setup, self.trace.around.work["head"]
        chunk = loss_chunk(setup.tokens, setup.model.vocab_size, setup.on_cpu)
        heads = 1 + setup.model.num_nextn_predict_layers
        calls = setup.compiled * heads * math.ceil(setup.tokens / chunk)
        return self.phase("head and loss", work.operators, self.device_parts(work), calls=calls)

    def backward(self) -> Phase:
        setup = self.setup
        work = self.trace.around.work["backward"] + self.work(self.blocks, "backward")
        gathered = setup.accumulation if setup.zero_stage == 2 or setup.reduces_once else 1  # times
        copied = launches = 0.0
        for group in self.groups:
            reduced, whole = setup.reduces(group.ranks), sum(group.sizes.values())
            copied += gathered * gradient_bytes(setup, reduced, whole, group.partition) / self.memory_rate
            of_gradient = gradient_operators(setup, reduced) * self.rates.operator + self.rates.parameter
            launches += gathered * len(group.sizes) * of_gradient
        device = added(self.device_parts(work), {"copies": copied, "exchange": self.collectives["backward"]})
        calls = self.regions([*self.blocks, *self.blocks[: setup.recompute_blocks]])
        phase = self.phase("backward", work.operators + ENGINE_OPERATORS, device, work.waits, calls)
        return replace(phase, launches=phase.launches + launches)

    def reduction(self, backward: float) -> Phase:
        """What of the gradients' reduction does not hide behind the backward pass."""
        setup = self.setup
        times = setup.accumulation if setup.zero_stage == 2 else 1  # ZeRO-1: in the last pass of a step alone
        of_pass = {False: self.collectives["reduction"] / times, True: self.collectives["reduction of experts"] / times}
        seconds = sum(of_pass.values())
        if setup.overlap:
            found = buckets(setup, self.groups, self.trace)
            seconds = seconds_not_hidden(found, backward / setup.accumulation, of_pass, not setup.reduces_once)
        return Phase("gradients, not hidden", 0.0, {"gradients": times * seconds})

    def update(self) -> Phase:
        setup, rates = self.setup, self.rates
        moved = sum(update_bytes(setup, setup.state_bytes_of(group)) * group.partition for group in self.groups)
        rate = self.device.host_memory_rate if setup.offload else self.memory_rate
        batches = [batch for group in self.groups for batch in group.batches(setup.topology())]
        gemms = Counter(gemm for batch in batches for gemm in newton_schulz(batch))
        device: Parts = {
            "gemms": NEWTON_SCHULZ_STEPS * self.gemms_seconds(gemms),
            "optimizer": moved / rate,
            "transfers": sum(host_transfers(setup)) / self.device.host / rates.links,
            "weights": self.collectives["update"],
        }
        operators = UPDATE_OPERATORS + MUON_OPERATORS * len(batches)
        return Phase("update", operators * rates.operator, device, rates.wait, setup.on_cpu)

    # --- what phases are made of ------------------------------------------------------------------------------------

    @property
    def memory_rate(self) -> float:
        return self.device.memory_rate * self.rates.memory

    def phase(self, name: str, operators: float, device: Parts, waits: float = 0, calls: int = 0) -> Phase:
        """Args are of one micro-batch, but for `device`; `calls` are those of compiled regions."""
        passes, rates = self.setup.accumulation, self.rates
        seconds = passes * (operators * rates.operator + calls * rates.region)
        return Phase(name, seconds, device, passes * waits * rates.wait, self.setup.on_cpu)

    def device_parts(self, work: Work) -> Parts:
        """The device's seconds."""
        setup, passes = self.setup, self.setup.accumulation
        others = work.operators - work.gemms.total()
        least = KERNEL * max(others, 0) if self.device.multiprocessors else 0.0
        attention = attention_seconds(work.attention, setup.model.head_dim, self.device, self.rates, setup.weight_bytes)
        return {
            "gemms": passes * self.gemms_seconds(work.gemms),
            "attention": passes * attention,
            "memory": passes * (least + work.bytes / self.memory_rate),
        }

    def gemms_seconds(self, gemms: Counter[Gemm]) -> float:
        of_each = (
            count * gemm_seconds(gemm, self.device, self.rates, self.setup.weight_bytes)
            for gemm, count in gemms.items()
        )
        return sum(of_each)
