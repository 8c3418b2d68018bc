"""Bytes that a block keeps from forward to backward, part by part, and the largest that comes and goes meanwhile.

They are what torch's autograd keeps for the operations of `attention.py`, `latent_attention.py`, `rope.py`,
`feed_forward.py`, `router.py`, `router_losses.py` and `block.py` in `model/`; those of the experts are in
`expert_layer.py`.

Shape legend: N tokens, D hidden_size, E experts, K choices, H query heads, G key/value heads, d head_dim, v the width
of a value, s bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.planning.attention_cost import is_masked
from megamoe.planning.expert_layer import ExpertBytes, expert_bytes, tensors_inside
from megamoe.planning.layer import BlockKind
from megamoe.planning.sharding import Setup


@dataclass(frozen=True)
class MLPBytes:
    """Of one MLP for all tokens."""

    inside: int  # one tensor inside it
    hidden: int  # all that is kept inside it
    gate: int  # of the gate on what it gives

    @property
    def kept(self) -> int:
        """From forward to backward, without its input."""
        return self.hidden + self.gate


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block."""

    norm: int  # of one RMSNorm
    norm_backward: int  # temporaries of one RMSNorm's backward
    attention: int
    attention_backward: int
    router: int
    router_backward: int
    experts: ExpertBytes | None  # of a sparse block
    mlp: MLPBytes | None  # of a dense block, or of the shared experts
    mlp_input: int  # where nothing else keeps it
    callers: int  # temporaries of forward that the running calls keep
    stream: int  # one tensor of the residual stream

    @property
    def kept(self) -> int:
        """From forward to backward."""
        half = self.router + (self.experts.kept if self.experts else 0)
        shared = self.mlp.kept + self.mlp_input if self.mlp else 0
        return 2 * self.norm + self.attention + half + shared

    @property
    def moving(self) -> int:
        """Temporaries of forward beyond what is kept: while rows are exchanged and the experts run, or in the MLP."""
        if not self.mlp:
            return self.callers + (self.experts.moving if self.experts else 0)
        # What the MLP gives, and the sum with the residual stream.
        sums = 2 * self.stream
        if not self.experts:
            return self.callers + sums
        # The shared experts run when the others are done, whose result waits: what they keep is not there yet.
        return self.callers + max(self.experts.moving - self.mlp.kept, sums + self.stream)


def block_bytes(setup: Setup, kind: BlockKind) -> BlockBytes:
    """A block's bytes, experts under balance."""
    m, s, n = setup.model, setup.weight_bytes, setup.tokens
    stream, wide = s * n * m.hidden_size, 4 * n * m.hidden_size  # of the residual stream, and of it in fp32
    width = m.intermediate_size if kind.is_dense else m.shared_size
    jittered = wide if m.router_jitter_noise else 0
    # Under 16 bits, what enters the block, its second norm and its experts is kept by the running calls alone.
    callers = 0 if s == 4 else 3 * stream if setup.on_cpu else stream
    if width and s < 4:
        callers -= stream  # the MLP keeps its input
    attention, attention_backward = _latent(setup) if m.kv_lora_rank else _grouped_query(setup, kind.window)
    return BlockBytes(
        norm=norm_bytes(setup, n, m.hidden_size),
        norm_backward=5 * wide if setup.on_cpu else 2 * stream,
        attention=attention,
        attention_backward=attention_backward,
        router=0 if kind.is_dense else _router(setup),
        router_backward=0 if kind.is_dense else wide + jittered,
        experts=None if kind.is_dense else expert_bytes(setup),
        mlp=_mlp(setup, width, has_gate=m.shared_expert_gate and not kind.is_dense) if width else None,
        mlp_input=stream if s < 4 or kind.is_dense else 0,  # in fp32 the router keeps it
        callers=callers,
        stream=stream,
    )


def norm_bytes(setup: Setup, rows: int, width: int) -> int:
    """Kept by one RMSNorm: on CPU made of operations in fp32, on a GPU one kernel that keeps its input."""
    return (8 if setup.on_cpu else setup.weight_bytes) * rows * width + 4 * rows


def _mlp(setup: Setup, width: int, has_gate: bool) -> MLPBytes:
    m, s, n = setup.model, setup.weight_bytes, setup.tokens
    inside = s * n * width
    gate = s * n * (m.hidden_size + 1) if has_gate else 0  # what it multiplies, and the sigmoid
    return MLPBytes(inside, inside * tensors_inside(m), gate)


def _router(setup: Setup) -> int:
    m, s, n = setup.model, setup.weight_bytes, setup.tokens
    wide, scores = 4 * n * m.hidden_size, 4 * n * m.num_local_experts
    parts = [
        (wide, True),
        (wide, m.router_jitter_noise > 0),
        (scores, True),
        (2 * scores, m.router_score == "sigmoid" and (m.norm_topk_prob or m.router_aux_loss_coef > 0)),
        (n * m.num_experts_per_tok * (8 + 4 * m.norm_topk_prob), True),  # ids, weights
        (4 * m.num_local_experts * m.hidden_size, s < 4),
        (scores, m.router_aux_loss_coef > 0),  # the share of each
        (4 * n, m.router_z_loss_coef > 0),
    ]
    return sum(size for size, is_there in parts if is_there)


def _grouped_query(setup: Setup, window: int | None) -> tuple[int, int]:
    """(kept, temporaries of backward)."""
    m, s = setup.model, setup.weight_bytes
    length = setup.seq_len + m.num_latent_tokens
    positions = setup.micro_batch * length
    query, key = (s * positions * heads * m.head_dim for heads in (m.num_attention_heads, m.num_key_value_heads))
    kept = s * positions * m.hidden_size + 2 * query + 2 * key + 4 * positions * m.num_attention_heads
    if m.qk_norm:
        for heads in (m.num_attention_heads, m.num_key_value_heads):
            rows, width = (positions, heads * m.head_dim) if m.qk_norm == "full" else (positions * heads, m.head_dim)
            kept += norm_bytes(setup, rows, width)
    if m.rotary_dim < m.head_dim:
        kept += 2 * s * length * m.head_dim  # the padded table, of queries and of keys
    if is_masked(setup, window):
        kept += s * length**2  # the mask's numbers
        kept += 0 if setup.on_cpu else 2 * (query - key)  # keys and values of each query head
    return kept, 2 * query + 2 * key


def _latent(setup: Setup) -> tuple[int, int]:
    """(kept, temporaries of backward)."""
    m, s, n = setup.model, setup.weight_bytes, setup.tokens
    heads, compressed = m.num_attention_heads, m.kv_lora_rank or 0
    query, values = s * n * heads * m.head_dim, s * n * heads * m.value_dim
    expanded = s * n * heads * (m.head_dim - m.rotary_dim) + values
    padded = setup.on_cpu and m.value_dim < m.head_dim
    parts = [
        (s * n * m.hidden_size, True),
        (2 * query + 4 * n * heads, True),  # queries and keys, and the sums of the scores' exponentials
        (norm_bytes(setup, n, compressed) + s * n * compressed, True),
        (0 if setup.on_cpu else s * n * m.rotary_dim, True),  # what the norm keeps is a part of one tensor
        (2 * query + values, padded),  # values, and their averages twice
        (2 * values, not padded and not setup.on_cpu),
        (expanded + values, not padded and setup.on_cpu),  # the values are a part of one tensor
        (s * setup.seq_len * m.head_dim, True),  # the padded table
    ]
    if m.q_lora_rank:
        parts.append((norm_bytes(setup, n, m.q_lora_rank) + s * n * m.q_lora_rank, True))
    kept = sum(size for size, is_there in parts if is_there)
    return kept, 2 * query + 2 * max(values, query if padded else 0)
