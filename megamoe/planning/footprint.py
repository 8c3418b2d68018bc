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

import math
from collections import Counter
from dataclasses import dataclass

from megamoe.model.loss import LOSS_CHUNK
from megamoe.model.moe import CPU_ROW_MULTIPLE
from megamoe.planning.buckets import Ledger, Reduction
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
    dispatch: int  # indices of the rows' way there and back, and the rows as the experts see them
    hidden: int  # inside the experts
    returned: int  # the experts' results, for the gradient of the combine weights
    result: int  # one tensor of the rows as the experts see them
    moving: int  # temporaries of forward while rows are exchanged and the experts run
    stream: int  # one tensor of the residual stream

    @property
    def kept(self) -> int:
        """From forward to backward."""
        return 2 * self.norm + self.attention + self.router + self.dispatch + self.hidden + self.returned


def layer_bytes(setup: Setup) -> LayerBytes:
    """A layer's bytes, experts under balance."""
    m, s, n = setup.model, setup.weight_bytes, setup.tokens
    wide = 4 * n * m.hidden_size  # a tensor of the residual stream in fp32
    stream = s * n * m.hidden_size
    positions = setup.micro_batch * (setup.seq_len + m.num_latent_tokens)
    query = s * positions * m.num_attention_heads * m.head_dim
    key = s * positions * m.num_key_value_heads * m.head_dim
    log_sum_exp = 4 * positions * m.num_attention_heads
    # Cutting the latents' queries off leaves a view, of which the output projection takes a copy.
    cut = s * n * m.num_attention_heads * m.head_dim if m.num_latent_tokens else 0

    per_expert = setup.rows // setup.experts_per_rank
    if setup.on_cpu and m.num_experts_per_tok == m.num_local_experts:
        per_expert = math.ceil(per_expert / CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE
    elif setup.on_cpu:
        per_expert += (CPU_ROW_MULTIPLE - 1) // 2  # counts differ from expert to expert: the mean of the fill
    filled = per_expert * setup.experts_per_rank
    rows, result = s * setup.rows * m.hidden_size, s * filled * m.hidden_size
    index = 8 * (filled + setup.rows) + (16 * setup.rows if setup.ep_size > 1 else 0)
    dropped = (s if setup.on_cpu else 1) * filled * m.hidden_size if m.expert_dropout else 0

    scores = 4 * n * m.num_local_experts * (3 if m.router_score == "sigmoid" else 1)
    choices = n * m.num_experts_per_tok * (8 + 4 + (s if s < 4 else 0))  # ids, weights, weights as rows have them
    router_weight = 4 * m.num_local_experts * m.hidden_size if s < 4 else 0
    # Under bf16, what enters the layer and what enters the experts are kept by nobody but the running call.
    callers = 2 * stream if setup.on_cpu else stream
    return LayerBytes(
        # On CPU, RMSNorm is made of operations in fp32; on a GPU it is one kernel that keeps its input.
        norm=2 * wide + 4 * n if setup.on_cpu else stream + 4 * n,
        norm_backward=5 * wide if setup.on_cpu else 2 * stream,
        attention=stream + 2 * query + 2 * key + log_sum_exp + cut,
        attention_backward=2 * query + 2 * key + cut,
        router=(2 if m.router_jitter_noise else 1) * wide + scores + choices + router_weight,
        router_backward=(2 if m.router_jitter_noise else 1) * wide,
        dispatch=index + result,
        hidden=2 * s * filled * m.intermediate_size + dropped,
        returned=rows,
        result=result,
        moving=(2 * result if setup.ep_size == 1 else 4 * rows) + (callers if s < 4 else 0),
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
    chunk = min(LOSS_CHUNK, setup.tokens) * m.vocab_size
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
    reduction.ready("model.norm.weight")
    _norm_backward(layer, ledger)
    for number in reversed(range(m.num_hidden_layers)):
        if number < setup.recompute_blocks:
            ledger.allocate("activations", layer.kept - layer.stream)
            ledger.transient("temporaries", layer.moving)
        _experts_backward(setup, layer, ledger, reduction, f"model.layers.{number}.moe.experts")
        name = f"model.layers.{number}"
        ledger.transient("temporaries", layer.router_backward)
        ledger.free("activations", layer.router)
        reduction.ready(f"{name}.moe.router.weight")
        reduction.ready(f"{name}.post_attention_layernorm.weight")
        _norm_backward(layer, ledger)
        reduction.ready(f"{name}.self_attn.o_proj.weight")
        ledger.transient("temporaries", layer.attention_backward)
        ledger.free("activations", layer.attention)
        if m.num_latent_tokens:
            reduction.ready(f"{name}.self_attn.latents")
        for projection in ("v_proj", "k_proj", "q_proj"):
            reduction.ready(f"{name}.self_attn.{projection}.weight")
        reduction.ready(f"{name}.input_layernorm.weight")
        _norm_backward(layer, ledger)
    ledger.transient("gradients", 2 * embedding)
    ledger.free("gradients of activations", layer.stream)
    ledger.free("activations", ledger.held["activations"])
    ledger.free("gradients", embedding)
    reduction.ready("model.embed_tokens.weight")


def _norm_backward(layer: LayerBytes, ledger: Ledger) -> None:
    # The product that the weight's gradient needs is freed first.
    ledger.free("activations", layer.norm // 2)
    ledger.transient("temporaries", layer.norm_backward)
    ledger.free("activations", layer.norm - layer.norm // 2)


def _experts_backward(setup: Setup, layer: LayerBytes, ledger: Ledger, reduction: Reduction, name: str) -> None:
    """From the gradient of a layer's output to that of the experts' input."""
    m, s, count = setup.model, setup.weight_bytes, setup.experts_per_rank
    ledger.transient("temporaries", 2 * layer.returned)  # gradients of the weighted rows, and products for the weights'
    ledger.free("activations", layer.returned)
    ledger.transient("temporaries", layer.result + layer.returned)  # rows going back to their experts
    ledger.allocate("gradients of activations", layer.result)
    hidden = setup.weight_bytes * m.intermediate_size * (layer.result // (s * m.hidden_size) // count)
    for expert in reversed(range(count)):
        weight = s * m.intermediate_size * m.hidden_size
        ledger.transient("temporaries", hidden + weight)
        reduction.ready(f"{name}.{expert}.down_proj.weight")
        ledger.transient("temporaries", 2 * hidden)
        ledger.free("activations", layer.hidden // count)
        ledger.transient("temporaries", hidden + weight)
        reduction.ready(f"{name}.{expert}.up_proj.weight")
        ledger.allocate("gradients of activations", layer.result // count)
    ledger.free("gradients of activations", layer.result)
    ledger.free("activations", layer.dispatch + layer.hidden % count)
    ledger.transient("temporaries", layer.result)
    ledger.free("gradients of activations", layer.result // count * count)


def _step(setup: Setup, reduction: Reduction) -> None:
    ledger = reduction.ledger
    for group in reduction.groups:
        if not setup.sums_apart and not setup.offload:
            ledger.transient("flat gradients", 4 * group.partition)  # the rank's share in fp32, scaled
    ledger.free("gradients owned", ledger.held["gradients owned"])
    ledger.free("gradient partition", ledger.held["gradient partition"])
