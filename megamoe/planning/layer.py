"""What a block gives a device to do, as the sum of its parts.

The counts are those of torch's dispatcher; tests hold them against the real model.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from megamoe.config.model import ModelConfig
from megamoe.planning.attention_cost import attention_cost
from megamoe.planning.feed_forward_cost import experts_cost, mlp_cost, router_cost, shared_cost
from megamoe.planning.part_cost import BothWays, Cost, norm_cost, total
from megamoe.planning.sharding import Setup

# Share of the bytes that is left where each compiled region reads its inputs once and writes its results once; derived
# by hand, not counted yet.
COMPILED_BYTES = 0.5


class BlockKind(NamedTuple):
    """What blocks can differ in."""

    is_dense: bool  # one MLP in place of experts
    window: int | None = None  # positions that a query sees


def block_kinds(model: ModelConfig) -> list[BlockKind]:
    """The blocks, first block first; that of multi-token prediction comes last."""
    numbers = range(model.num_hidden_layers)
    kinds = [BlockKind(model.is_dense(number), model.window(number)) for number in numbers]
    return kinds + [BlockKind(False, model.window(-1))] * model.num_nextn_predict_layers


def block_cost(setup: Setup, kind: BlockKind) -> Cost:
    """A block; where it is compiled, its operators are the kernels that are left."""
    m, outside = setup.model, setup.tokens * setup.model.hidden_size
    half = norm_cost(outside, setup.weight_bytes, setup.on_cpu)
    half += Cost(BothWays(1, 1), BothWays(0, 0), BothWays(3, 3) * (setup.weight_bytes * outside))  # residual sum
    parts = [half, half, attention_cost(setup, kind.window)]
    if kind.is_dense:
        parts.append(mlp_cost(setup, m.intermediate_size))
    else:
        parts += [router_cost(setup), experts_cost(setup), shared_cost(setup)]
    cost = total(*parts)
    if not setup.compiled:
        return cost
    return Cost(cost.kernels, cost.kernels, cost.bytes * COMPILED_BYTES, cost.products, cost.attention)


def blocks_cost(setup: Setup, kinds: list[BlockKind]) -> Cost:
    """Several blocks."""
    found = Cost()
    for kind, count in Counter(kinds).items():
        found += block_cost(setup, kind).times(count)
    return found


def compiled_regions(setup: Setup, kind: BlockKind) -> int:
    """Regions of a block that the host calls each way: around the experts, and between the products of gated ones; one
    of a dense block."""
    return (1 if kind.is_dense else 2 + setup.model.gated_mlp) * setup.compiled
