"""Bytes that a training step takes on one rank, by arithmetic: one step walked through as torch and DeepSpeed do it.

Everything that is large is allocated and freed by name, in the order of the real step, and the peak is kept.
The order and the sizes of DeepSpeed's buffers are those of `deepspeed/runtime/zero/stage_1_and_2.py` (0.19), those of
the activations are what torch's autograd keeps for the operations of `attention.py`, `rope.py`, `experts.py`,
`router.py`, `moe.py` and `loss.py` in `model/`.

Shape legend: B micro-batch, T positions, N = B * T tokens, D hidden_size, F intermediate_size, V vocab_size, E experts,
K choices, R = N * K rows after dispatch, H query heads, G key/value heads, d head_dim, M latent tokens, s bytes of a
weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megamoe.model.loss import loss_chunk
from megamoe.model.names import EMBEDDING, engine_name
from megamoe.planning.buckets import Ledger, Reduction
from megamoe.planning.expert_layer import ExpertBytes, expert_bytes, experts_backward
from megamoe.planning.sharding import Group, Setup, elements_touched, parameter_groups

# --- what autograd keeps of a layer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer keeps from forward to backward, and the largest that comes and goes meanwhile."""

    norm: int  # of one RMSNorm
    norm_backward: int  # temporaries of one RMSNorm's backward
    attention: int
    attention_backward: int
    router: int
    router_backward: int
    experts: ExpertBytes
    callers: int  # temporaries of forward that the running calls keep
    stream: int  # one tensor of the residual stream

    @property
    def kept(self) -> int:
        """From forward to backward."""
        return 2 * self.norm + self.attention + self.router + self.experts.kept

    @property
    def moving(self) -> int:
        """Temporaries of forward while rows are exchanged and the experts run."""
        return self.callers + self.experts.moving


def layer_bytes(setup: Setup) -> LayerBytes:
    """A layer's bytes, experts under balance."""
    m, s, n = setup.model, setup.weight_bytes, setup.tokens
    wide = 4 * n * m.hidden_size  # a tensor of the residual stream in fp32
    stream = s * n * m.hidden_size
    positions = setup.micro_batch * (setup.seq_len + m.num_latent_tokens)
    query = s * positions * m.num_attention_heads * m.head_dim
    key = s * positions * m.num_key_value_heads * m.head_dim
    log_sum_exp = 4 * positions * m.num_attention_heads

    scores = 4 * n * m.num_local_experts * (3 if m.router_score == "sigmoid" else 1)
    choices = n * m.num_experts_per_tok * (8 + 4)  # ids, weights
    router_weight = 4 * m.num_local_experts * m.hidden_size if s < 4 else 0
    # Under 16 bits, what enters the block, its experts' norm and its experts is kept by the running calls alone.
    callers = 0 if s == 4 else 3 * stream if setup.on_cpu else stream
    return LayerBytes(
        # On CPU, RMSNorm is made of operations in fp32; on a GPU it is one kernel that keeps its input.
        norm=2 * wide + 4 * n if setup.on_cpu else stream + 4 * n,
        norm_backward=5 * wide if setup.on_cpu else 2 * stream,
        attention=s * positions * m.hidden_size + 2 * query + 2 * key + log_sum_exp,
        attention_backward=2 * query + 2 * key,
        router=(2 if m.router_jitter_noise else 1) * wide + scores + choices + router_weight,
        router_backward=(2 if m.router_jitter_noise else 1) * wide,
        experts=expert_bytes(setup),
        callers=callers,
        stream=stream,
    )


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
    groups, layer, ledger = parameter_groups(setup), layer_bytes(setup), Ledger()
    reduction = Reduction(setup, groups, rank, ledger)
    states, host = _states(setup, groups, rank)
    _hold(setup, groups, states, ledger)
    between = Counter(ledger.held)
    forward = backward = Counter[str]()
    for micro in range(setup.accumulation):
        ledger.restart()
        _forward(setup, layer, ledger)
        forward = max(forward, ledger.peak, key=Counter.total)
        ledger.restart()
        _backward(setup, layer, ledger, reduction, first=micro == 0, boundary=micro == setup.accumulation - 1)
        reduction.finish()
        backward = max(backward, ledger.peak, key=Counter.total)
    ledger.restart()
    _step(setup, reduction)
    assert ledger.held == between, ledger.held - between
    return Footprint(between, forward, backward, ledger.peak, host)


def _states(setup: Setup, groups: list[Group], rank: int) -> tuple[Counter[str], Counter[str]]:
    """Masters, optimizer state and, where these are offloaded, the buffers that go with it: (in the device's memory, in
    the host's, which is the same one on CPU)."""
    share = sum(group.partition for group in groups)
    # A copy under fp32 too.
    states = Counter({"fp32 masters": 4 * share, "optimizer state": setup.state_bytes * share})
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
    ledger.allocate("batch and router state", 16 * (setup.tokens + m.num_hidden_layers * m.num_local_experts))


def _forward(setup: Setup, layer: LayerBytes, ledger: Ledger) -> None:
    m, s = setup.model, setup.weight_bytes
    ledger.allocate("activations", s * setup.seq_len * m.head_dim)  # cos and sin
    for number in range(m.num_hidden_layers):
        ledger.allocate("activations", layer.kept)
        ledger.transient("temporaries", layer.moving)
        if number < setup.recompute_blocks:
            ledger.free("activations", layer.kept - layer.stream)  # of which the input stays
    ledger.allocate("activations", layer.norm + layer.stream)
    # The loss: gradients of the head's weight in fp32 and of the hidden states, made chunk by chunk.
    weight = m.vocab_size * m.hidden_size
    chunk = loss_chunk(setup.tokens, m.vocab_size, setup.on_cpu) * m.vocab_size
    ledger.allocate("gradients of the head", 4 * weight + layer.stream)
    # In fp32, with what they were made of or what is made of them; then the product that is added to the gradient.
    ledger.transient("loss chunk", 4 * chunk + (s * chunk if s < 4 else 0))
    ledger.transient("loss chunk", s * chunk + s * weight)


def _backward(
    setup: Setup, layer: LayerBytes, ledger: Ledger, reduction: Reduction, first: bool, boundary: bool
) -> None:
    m, s = setup.model, setup.weight_bytes
    embedding = s * m.vocab_size * m.hidden_size
    # What forward made, scaled by the gradient of the loss.
    ledger.transient("temporaries", 4 * m.vocab_size * m.hidden_size + (embedding if s < 4 else 0))
    ledger.allocate("gradients", embedding)  # tied: it waits for the embedding's own to the end of the pass
    ledger.allocate("gradients of activations", layer.stream)
    ledger.free("gradients of the head", ledger.held["gradients of the head"])
    ledger.free("activations", layer.stream)
    reduction.start(first, boundary)
    reduction.ready(engine_name("model.norm.weight"))
    _norm_backward(layer, ledger)
    for number in reversed(range(m.num_hidden_layers)):
        if number < setup.recompute_blocks:
            ledger.allocate("activations", layer.kept - layer.stream)
            ledger.transient("temporaries", layer.moving)
        experts_backward(setup, layer.experts, ledger, reduction, number)
        _rest_of_block_backward(setup, layer, ledger, reduction, number)
    ledger.transient("gradients", 2 * embedding)
    ledger.free("gradients of activations", layer.stream)
    ledger.free("activations", ledger.held["activations"])
    ledger.free("gradients", embedding)
    reduction.ready(engine_name(EMBEDDING))


def _rest_of_block_backward(setup: Setup, layer: LayerBytes, ledger: Ledger, reduction: Reduction, number: int) -> None:
    """Router, norms and attention."""

    def ready(name: str) -> None:
        reduction.ready(engine_name(f"model.layers.{number}.{name}"))

    ledger.transient("temporaries", layer.router_backward)
    ledger.free("activations", layer.router)
    ready("moe.router.weight")
    ready("post_attention_layernorm.weight")
    _norm_backward(layer, ledger)
    ready("self_attn.o_proj.weight")
    ledger.transient("temporaries", layer.attention_backward)
    ledger.free("activations", layer.attention)
    if setup.model.num_latent_tokens:
        ready("self_attn.latents")
    for projection in ("v_proj", "k_proj", "q_proj"):
        ready(f"self_attn.{projection}.weight")
    ready("input_layernorm.weight")
    _norm_backward(layer, ledger)


def _norm_backward(layer: LayerBytes, ledger: Ledger) -> None:
    # The product that the weight's gradient needs is freed first.
    ledger.free("activations", layer.norm // 2)
    ledger.transient("temporaries", layer.norm_backward)
    ledger.free("activations", layer.norm - layer.norm // 2)


def _step(setup: Setup, reduction: Reduction) -> None:
    ledger = reduction.ledger
    for group in reduction.groups:
        if not setup.sums_apart and not setup.offload:
            ledger.transient("flat gradients", 4 * group.partition)  # the rank's share in fp32, scaled
    ledger.free("gradients owned", ledger.held["gradients owned"])
    ledger.free("gradient partition", ledger.held["gradient partition"])
