"""Bytes that a training step takes on one rank, by arithmetic: one step walked through as torch and DeepSpeed do it.

Everything that is large is allocated and freed by name, in the order of the real step, and the peak is kept.
The order and the sizes of DeepSpeed's buffers are those of `deepspeed/runtime/zero/stage_1_and_2.py` (0.19), those of
the activations are in `activations.py` and `expert_layer.py`.

Shape legend: D hidden_size, V vocab_size, s bytes of a weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megamoe.model.loss import loss_chunk
from megamoe.model.margins import BINS
from megamoe.model.names import EMBEDDING, HEAD, engine_name
from megamoe.planning.activations import BlockBytes, block_bytes
from megamoe.planning.attention_cost import is_masked
from megamoe.planning.block_backward import block_backward, norm_backward
from megamoe.planning.buckets import Ledger, Reduction
from megamoe.planning.layer import block_kinds
from megamoe.planning.sharding import Group, Setup, elements_touched, parameter_groups
from megamoe.training.matrix_share import MatrixShare, Run

# --- the walk -------------------------------------------------------------------------------------------------------


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


def footprint(setup: Setup, rank: int = 0) -> Footprint:
    """Bytes of tensors on `rank` in a step after the first one, which makes the optimizer's state."""
    groups, ledger = parameter_groups(setup), Ledger()
    of_kind = {kind: block_bytes(setup, kind) for kind in set(block_kinds(setup.model))}
    blocks = [of_kind[kind] for kind in block_kinds(setup.model)]
    reduction = Reduction(setup, groups, rank, ledger)
    states, host = _states(setup, groups, rank)
    _hold(setup, groups, states, ledger)
    between = Counter(ledger.held)
    forward = backward = Counter[str]()
    for micro in range(setup.accumulation):
        ledger.restart()
        _forward(setup, blocks, ledger)
        forward = max(forward, ledger.peak, key=Counter.total)
        ledger.restart()
        _backward(setup, blocks, ledger, reduction, first=micro == 0, boundary=micro == setup.accumulation - 1)
        reduction.finish()
        backward = max(backward, ledger.peak, key=Counter.total)
    ledger.restart()
    _step(setup, reduction, rank)
    assert ledger.held == between, ledger.held - between
    return Footprint(between, forward, backward, ledger.peak, host)


def _states(setup: Setup, groups: list[Group], rank: int) -> tuple[Counter[str], Counter[str]]:
    """Masters, optimizer state and, where these are offloaded, the buffers that go with it: (in the device's memory, in
    the host's, which is the same one on CPU)."""
    share = sum(group.partition for group in groups)
    # A copy under fp32 too.
    state = sum(setup.state_bytes_of(group) * group.partition for group in groups)
    states = Counter({"fp32 masters": 4 * share, "optimizer state": state})
    if setup.average_bytes:
        states["averaged weights"] = setup.average_bytes * share
    if not setup.offload:
        return states, Counter()
    states["fp32 gradients"] = 4 * share
    states["updated weights"] = setup.weight_bytes * share
    states["gradient buffer"] = setup.weight_bytes * _largest(groups)
    if setup.sums_on_host:
        states["gradients summed"] = setup.weight_bytes * elements_touched(setup, groups, rank)
    return (states, Counter()) if setup.on_cpu else (Counter(), states)


def _largest(groups: list[Group]) -> int:
    """Elements of the largest parameter."""
    return max(size for group in groups for size in group.sizes.values())


def _hold(setup: Setup, groups: list[Group], states: Counter[str], ledger: Ledger) -> None:
    """Allocate what the device keeps from step to step."""
    m = setup.model
    ledger.allocate("weights", setup.weight_bytes * sum(group.partition * group.ranks for group in groups))
    for kind, size in states.items():
        ledger.allocate(kind, size)
    if setup.offload:
        ledger.allocate("gradient buffer", setup.weight_bytes * _largest(groups))
    ahead = 8 * setup.micro_batch * m.num_nextn_predict_layers
    per_expert = 12 + 4 * m.router_bias + 8 * BINS * m.counts_margins
    routers = per_expert * len(m.sparse_blocks) * m.num_local_experts
    ledger.allocate("batch and router state", 16 * setup.tokens + ahead + routers)


def _forward(setup: Setup, blocks: list[BlockBytes], ledger: Ledger) -> None:
    m, s = setup.model, setup.weight_bytes
    rotary = s * setup.seq_len * m.rotary_dim
    ledger.allocate("activations", rotary)  # cos and sin
    if masked := {kind.window for kind in block_kinds(m) if is_masked(setup, kind.window)}:
        ledger.allocate("activations", len(masked) * setup.seq_len**2)
    layers = m.num_hidden_layers
    for number, block in enumerate(blocks[:layers]):
        ledger.allocate("activations", block.kept)
        ledger.transient("temporaries", block.moving)
        if number < setup.recompute_blocks:
            ledger.free("activations", block.kept - block.stream)  # of which the input stays
    last = blocks[0]
    ledger.allocate("activations", last.norm + last.stream)
    _head_forward(setup, last.stream, ledger)
    for block in blocks[layers:]:
        # Both norms and what they give, joined.
        ledger.allocate("activations", 2 * block.norm + 2 * block.stream - _kept_hidden(setup, block))
        ledger.allocate("activations", block.kept)
        ledger.transient("temporaries", block.moving + (2 * block.stream if s < 4 else 0))
        ledger.allocate("activations", block.norm + block.stream)
        _head_forward(setup, block.stream, ledger)


def _kept_hidden(setup: Setup, block: BlockBytes) -> int:
    """What a norm of multi-token prediction need not keep: the hidden states, which the model's last norm keeps."""
    return block.stream if setup.weight_bytes == 4 or not setup.on_cpu else 0


def _head_forward(setup: Setup, stream: int, ledger: Ledger) -> None:
    """The loss: gradients of the head's weight in fp32 and of the hidden states, made chunk by chunk."""
    m, s = setup.model, setup.weight_bytes
    weight = m.vocab_size * m.hidden_size
    chunk = loss_chunk(setup.tokens, m.vocab_size, setup.on_cpu) * m.vocab_size
    ledger.allocate("gradients of the head", 4 * weight + stream)
    # In fp32, with what they were made of or what is made of them; then the product that is added to the gradient.
    ledger.transient("loss chunk", 4 * chunk + (s * chunk if s < 4 else 0))
    ledger.transient("loss chunk", s * chunk + s * weight)


def _backward(
    setup: Setup, blocks: list[BlockBytes], ledger: Ledger, reduction: Reduction, first: bool, boundary: bool
) -> None:
    m, s = setup.model, setup.weight_bytes
    embedding = s * m.vocab_size * m.hidden_size
    layers, stream = m.num_hidden_layers, blocks[0].stream
    further = blocks[layers:]  # of multi-token prediction
    started = False
    for block in further:
        _head_backward(setup, stream, ledger)
        reduction.start(first, boundary)
        started = True
        _multi_token_backward(setup, block, ledger, reduction)
    _head_backward(setup, stream, ledger)
    if further:  # added to that of the further head, or of the embedding there
        ledger.free("gradients", embedding)
    if not started:
        reduction.start(first, boundary)
    if not m.tie_word_embeddings:
        ledger.free("gradients", embedding)
        reduction.ready(engine_name(HEAD))
    reduction.ready(engine_name("model.norm.weight"))
    norm_backward(blocks[0], ledger)
    ledger.free("gradients of activations", len(further) * stream)  # of the hidden states, added
    for number in reversed(range(layers)):
        block = blocks[number]
        if number < setup.recompute_blocks:
            ledger.allocate("activations", block.kept - block.stream)
            ledger.transient("temporaries", block.moving)
        block_backward(setup, block, ledger, reduction, f"model.layers.{number}.")
    waits = m.tie_word_embeddings or bool(further)  # another gradient of the embedding, for this one
    ledger.transient("gradients", (2 if waits else 1) * embedding)
    ledger.free("gradients of activations", stream)
    ledger.free("activations", ledger.held["activations"])
    if waits:
        ledger.free("gradients", embedding)
    reduction.ready(engine_name(EMBEDDING))


def _head_backward(setup: Setup, stream: int, ledger: Ledger) -> None:
    """What forward made, scaled by the gradient of the loss. The gradient of the weight waits for others of it."""
    m, s = setup.model, setup.weight_bytes
    weight = m.vocab_size * m.hidden_size
    ledger.transient("temporaries", 4 * weight + (s * weight if s < 4 else 0))
    ledger.allocate("gradients", s * weight)
    ledger.allocate("gradients of activations", stream)
    ledger.free("gradients of the head", 4 * weight + stream)
    ledger.free("activations", stream)


def _multi_token_backward(setup: Setup, block: BlockBytes, ledger: Ledger, reduction: Reduction) -> None:
    """From the gradient of what the further head gets to those of the hidden states and of the embedding."""
    m, s = setup.model, setup.weight_bytes
    embedding = s * m.vocab_size * m.hidden_size

    def ready(name: str) -> None:
        reduction.ready(engine_name(f"model.mtp.{name}.weight"))

    ready("norm")
    norm_backward(block, ledger)
    block_backward(setup, block, ledger, reduction, "model.mtp.block.")
    ready("proj")
    ledger.transient("gradients of activations", 2 * block.stream)
    ledger.free("activations", 2 * block.stream - _kept_hidden(setup, block))
    for norm in ("hidden_norm", "embed_norm"):
        ready(norm)
        norm_backward(block, ledger)
    ledger.transient("gradients", embedding)
    if not m.tie_word_embeddings:  # it has a gradient of its own, that waits
        ledger.allocate("gradients", embedding)


def _step(setup: Setup, reduction: Reduction, rank: int) -> None:
    ledger = reduction.ledger
    for number, group in enumerate(reduction.groups):
        flat = 0 if setup.sums_apart or setup.offload else 4 * group.partition  # the rank's share in fp32, scaled
        ledger.allocate("flat gradients", flat)
        if number == len(reduction.groups) - 1:  # they are one buffer
            ledger.free("gradients owned", ledger.held["gradients owned"])
        if group.matrices:
            _orthogonalize(setup, group.matrix_share(setup.topology(rank)), ledger)
        ledger.free("flat gradients", flat)
        if number in reduction.partitions:
            ledger.free("gradient partition", setup.sum_bytes * group.partition)


def _orthogonalize(setup: Setup, share: MatrixShare, ledger: Ledger) -> None:
    """What `training/muon.py` allocates: the parts of a cut matrix that come, together with those here, and products of
    matrices."""
    if share.is_cut:
        ledger.allocate("products of matrices", 4 * sum(share.received))
        if share.tail:
            size = 4 * share.tail.rows * share.tail.columns
            ledger.allocate("products of matrices", size)
            ledger.transient("products of matrices", _product_bytes(setup, share.tail))
            ledger.free("products of matrices", size)
        ledger.free("products of matrices", 4 * sum(share.received))
    for run in share.whole:
        ledger.transient("products of matrices", _product_bytes(setup, run))


def _product_bytes(setup: Setup, run: Run) -> int:
    """At the peak of a batch: its matrices in fp32 and in the products' precision, or twice in that with two of the
    smaller squares."""
    values, square = run.count * run.rows * run.columns, run.count * min(run.rows, run.columns) ** 2
    itemsize = min(setup.weight_bytes, 4)
    return max(4 * values + (itemsize < 4) * itemsize * values, 2 * itemsize * (values + square))
