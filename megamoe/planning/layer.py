"""What one layer gives a device to do: operators, the matrix products among them, the bytes that the others move.

The counts are those of torch's dispatcher, views left out; tests hold them against the real model.

Shape legend: D hidden_size, F intermediate_size, K choices, H query heads, G key/value heads, d head_dim; s bytes of a
weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.planning.expert_layer import places
from megamoe.planning.sharding import Setup


@dataclass(frozen=True)
class BothWays:
    """A count of the forward and of the backward pass."""

    forward: float
    backward: float

    def __add__(self, other: BothWays) -> BothWays:
        return BothWays(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> BothWays:
        return BothWays(self.forward * factor, self.backward * factor)


# Share of the bytes below that is left where each compiled region reads its inputs once and writes its results once;
# derived by hand, not counted yet.
COMPILED_BYTES = 0.5
# Of one RMSNorm beyond those of the one kernel that a GPU has: torch makes it of others, in fp32.
NORM_OPERATORS_ON_CPU, NORM_PASSES_ON_CPU = BothWays(7, 16), BothWays(9, 24)


def layer_operators(setup: Setup) -> BothWays:
    """Operators of a layer in one forward and backward pass; attention is one each way, on a GPU RMSNorm too."""
    m, exchanged = setup.model, setup.ep_size > 1
    if setup.compiled:  # kernels; docs/performance.md says how they are counted
        return BothWays(30, 36) + BothWays(2, 2) * m.gated_mlp + BothWays(22, 7) * exchanged
    parts = [
        (BothWays(42, 44), True),
        (BothWays(1, 1), m.num_latent_tokens > 0),
        (BothWays(3, 1), m.router_jitter_noise > 0),
        (BothWays(6, 1) if setup.on_cpu else BothWays(1, 1), m.expert_dropout > 0),  # a CPU draws the mask itself
        (BothWays(1, 3), m.gated_mlp),
        (BothWays(1, 1), m.router_score == "sigmoid"),
        (BothWays(26, 7), exchanged),
        (BothWays(7 if exchanged else 11, 0), setup.on_cpu),  # rows are rounded up
        (NORM_OPERATORS_ON_CPU * 2, setup.on_cpu),
        (BothWays(-3, -2), setup.weight_bytes == 4),  # nothing to cast
        # Two products, for each expert one forward and two backward, not one kernel; split and joined again.
        (BothWays(2 * setup.experts_per_rank, 4 * setup.experts_per_rank + 2), setup.kernel == "loop"),
    ]
    return sum((count for count, is_there in parts if is_there), BothWays(0, 0))


def compiled_regions(setup: Setup) -> int:
    """Regions of a layer that the host calls each way: around the experts, and between the products of gated ones."""
    return (2 + setup.model.gated_mlp) * setup.compiled


# --- products -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """(rows, inside) times (inside, columns), in `groups` that one kernel takes together."""

    rows: float
    columns: float
    inside: float
    groups: int = 1
    calls: float = 1

    @property
    def flops(self) -> float:
        """Of all calls."""
        return 2.0 * self.calls * self.groups * self.rows * self.columns * self.inside

    def bytes(self, itemsize: int) -> float:
        """Read and written by one call, each operand once."""
        size = self.rows * self.inside + self.inside * self.columns + self.rows * self.columns
        return itemsize * self.groups * size

    def backward(self) -> list[Product]:
        """The products for the gradients of the rows and of the weight."""
        return [
            Product(self.rows, self.inside, self.columns, self.groups, self.calls),
            Product(self.columns, self.inside, self.rows, self.groups, self.calls),
        ]


def layer_products(setup: Setup) -> list[Product]:
    """Of a layer's forward pass, experts under balance; without attention's own and without the router's, which its
    bytes decide."""
    m = setup.model
    positions = setup.micro_batch * (setup.seq_len + m.num_latent_tokens)
    query, key = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    experts = setup.experts_per_rank
    groups, calls = (1, experts) if setup.kernel == "loop" else (experts, 1)
    rows, up = places(setup) / experts, m.intermediate_size * (2 if m.gated_mlp else 1)
    return [
        Product(positions, query, m.hidden_size),
        Product(positions, key, m.hidden_size, calls=2),
        Product(positions, m.hidden_size, query),
        Product(rows, up, m.hidden_size, groups, calls),
        Product(rows, m.hidden_size, m.intermediate_size, groups, calls),
    ]


def attention_flops(setup: Setup) -> BothWays:
    """Of the scores and the sums of values, over half the positions (causal) and all latents. Backward computes the
    scores again."""
    m = setup.model
    visible = setup.seq_len / 2 + m.num_latent_tokens
    flops = 4.0 * setup.tokens * visible * m.num_attention_heads * m.head_dim
    return BothWays(flops, 2.5 * flops)


# --- bytes ----------------------------------------------------------------------------------------------------------


def layer_bytes(setup: Setup) -> BothWays:
    """Bytes that a layer's operators read and write, those of products and of attention left out.

    Each number is a count of passes over rows of that width, of s bytes or, in the router, of 4.
    """
    m, s, exchanged = setup.model, setup.weight_bytes, setup.ep_size > 1
    slots = places(setup) / setup.tokens  # of a token
    hidden, chosen, inside = m.hidden_size, slots * m.hidden_size, slots * m.intermediate_size
    heads = (m.num_attention_heads + m.num_key_value_heads) * m.head_dim
    dropout = BothWays(11, 3) if setup.on_cpu else BothWays(2.5, 2.5)
    parts = [
        (s * hidden, BothWays(13, 26), True),  # norms, residual sums, gradients' sums
        (4 * hidden, BothWays(2, 3.5), True),  # the router's input in fp32
        (4 * hidden, BothWays(7, 3), m.router_jitter_noise > 0),
        (4 * hidden, NORM_PASSES_ON_CPU * 2, setup.on_cpu),
        (s * chosen, BothWays(6, 10), True),  # gathered, weighted, summed
        (s * chosen, dropout, m.expert_dropout > 0),
        (s * chosen, BothWays(4, 7), exchanged),  # laid out by expert once more
        (s * inside, BothWays(5, 13) if m.gated_mlp else BothWays(2, 3), True),  # activation
        (s * heads, BothWays(7, 7), True),  # rotated
    ]
    moved = sum((passes * width for width, passes, is_there in parts if is_there), BothWays(0, 0))
    return moved * (setup.tokens * (COMPILED_BYTES if setup.compiled else 1))
