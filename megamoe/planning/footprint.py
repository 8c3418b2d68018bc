"""Bytes that a training step takes on one rank: one step walked through as torch and DeepSpeed do it.

What the model makes and frees is replayed from its trace (`model_trace.py`), in the order of the real step, together
with DeepSpeed's buffers, whose order and sizes are those of `deepspeed/runtime/zero/stage_1_and_2.py` (0.19), and the
peak is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megamoe.planning.buckets import Ledger, Reduction
from megamoe.planning.model_trace import ACTIVATIONS, BLOCK, END, TEMPORARIES, ModelTrace, Trace, model_trace
from megamoe.planning.sharding import Group, Setup, elements_touched, parameter_groups
from megamoe.planning.sums import ReduceOnce
from megamoe.planning.tracer import Event
from megamoe.training.matrix_share import Run

SAVED = ("fp32 masters", "optimizer state", "averaged weights")  # what a checkpoint holds


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank, by kind: of its device, and of the host where the device has a memory of its own."""

    between: Counter[str]  # between two steps
    forward: Counter[str]  # at the peak of a forward pass
    backward: Counter[str]
    step: Counter[str]  # of the optimizer's step
    host: Counter[str]  # all the time

    @property
    def peak(self) -> Counter[str]:
        """At the peak of the step."""
        return max((self.forward, self.backward, self.step), key=Counter.total)

    @property
    def saved(self) -> int:
        """Bytes of this rank in a checkpoint."""
        return sum(self.between[kind] + self.host[kind] for kind in SAVED)


def footprint(setup: Setup, rank: int = 0) -> Footprint:
    """Bytes of tensors on `rank` in a step after the first one, which makes the optimizer's state."""
    groups, trace = parameter_groups(setup), model_trace(setup)
    between, host = _kept(setup, groups, rank, trace)
    ledger = Ledger(between)
    reduction = reduction_of(setup, groups, rank, ledger)
    forward = backward = Counter[str]()
    for micro in range(setup.accumulation):
        ledger.restart()
        _forward(trace, ledger)
        forward = max(forward, ledger.peak, key=Counter.total)
        ledger.restart()
        reduction.start(first=micro == 0, boundary=micro == setup.accumulation - 1)
        replay_backward(trace, ledger, reduction.ready)
        reduction.finish()
        backward = max(backward, ledger.peak, key=Counter.total)
    ledger.restart()
    _step(setup, reduction, rank)
    assert ledger.held == between, ledger.held - between
    return Footprint(between, forward, backward, ledger.peak, host)


def _kept(setup: Setup, groups: list[Group], rank: int, trace: ModelTrace) -> tuple[Counter[str], Counter[str]]:
    """What stays from step to step: (in the device's memory, in the host's, which is the same one on CPU)."""
    share = sum(group.partition for group in groups)
    batch = 8 * (2 * setup.tokens + setup.micro_batch * setup.model.num_nextn_predict_layers)  # ids and labels
    buffers = sum(part.buffers for part in (trace.around, *trace.blocks.values()))
    buffer = setup.weight_bytes * max(size for group in groups for size in group.sizes.values())
    states = Counter(
        {
            "fp32 masters": 4 * share,  # under fp32 too
            "optimizer state": sum(setup.state_bytes_of(group) * group.partition for group in groups),
            "averaged weights": setup.average_bytes * share,
        }
    )
    if setup.offload:
        states["fp32 gradients"] = 4 * share
        states["updated weights"] = setup.weight_bytes * share
        states["gradient buffer"] = buffer
    if setup.sums_on_host:
        states["gradients summed"] = setup.weight_bytes * elements_touched(setup, groups, rank)
    host = states if setup.offload and not setup.on_cpu else Counter[str]()
    device = Counter({"weights": setup.weight_bytes * sum(group.partition * group.ranks for group in groups)})
    device += states - host
    device += Counter({"gradient buffer": buffer * setup.offload, "batch and router state": batch + buffers})
    return device, +host


def _forward(trace: ModelTrace, ledger: Ledger) -> None:
    blocks = iter(trace.blocks.values())

    def block() -> None:
        (passed,) = next(blocks).events["forward"]
        kept = passed.level.total()
        ledger.allocate(ACTIVATIONS, kept)
        ledger.transient(TEMPORARIES, passed.peak.total() - kept)

    _replay(trace.around.events["forward"], ledger, Counter(), lambda _: block())


def reduction_of(setup: Setup, groups: list[Group], rank: int, ledger: Ledger) -> Reduction:
    return (ReduceOnce if setup.reduces_once else Reduction)(setup, groups, rank, ledger)


def replay_backward(trace: ModelTrace, ledger: Ledger, ready: Callable[[str], None]) -> None:
    """Allocate and free what a backward pass does; `ready` is called with the name of each gradient that comes."""
    blocks = reversed(trace.blocks.items())

    def block() -> None:
        prefix, traced = next(blocks)
        _part_backward(traced, ledger, lambda name: ready(f"{prefix}.{name}"))

    _part_backward(trace.around, ledger, ready, block)


def _part_backward(
    part: Trace, ledger: Ledger, ready: Callable[[str], None], block: Callable[[], None] = lambda: None
) -> None:
    """
    Args:
        ready: called with the name of each parameter whose gradient comes.
        block: called where a block runs.
    """
    held = part.events["forward"][-1].level
    held = _replay(part.events["backward"], ledger, held, lambda name: block() if name == BLOCK else ready(name))
    ledger.move(held, Counter())


def _replay(events: list[Event], ledger: Ledger, held: Counter[str], happens: Callable[[str], None]) -> Counter[str]:
    """Allocate and free what a pass does; returns what it leaves.

    Args:
        held: before the pass.
        happens: called with the name of each event but the end.
    """
    for event in events:
        ledger.move(held, event.peak)
        ledger.move(event.peak, event.level)
        held = event.level
        if event.name != END:
            happens(event.name)
    return held


def _step(setup: Setup, reduction: Reduction, rank: int) -> None:
    ledger = reduction.ledger
    for number, group in enumerate(reduction.groups):
        owned, share = reduction.partitions.get(number, 0), 4 * group.partition  # in fp32, scaled
        flat = 0 if owned == share or setup.offload else share
        ledger.allocate("flat gradients", flat)
        if number == len(reduction.groups) - 1:  # they are one buffer
            ledger.free("gradients owned", ledger.held["gradients owned"])
        for batch in group.batches(setup.topology(rank)):
            ledger.transient("temporaries of Muon", _muon_bytes(setup, batch))
        ledger.free("flat gradients", flat)
        ledger.free("gradient partition", owned)


def _muon_bytes(setup: Setup, run: Run) -> int:
    """At the peak of a batch: its matrices in fp32 and in the GEMMs' precision, or twice in that with two of the
    smaller squares."""
    values, square = run.count * run.rows * run.columns, run.count * min(run.rows, run.columns) ** 2
    itemsize = min(setup.weight_bytes, 4)
    return max(4 * values + (itemsize < 4) * itemsize * values, 2 * itemsize * (values + square))
