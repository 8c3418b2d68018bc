"""What lies outside of the blocks gives a device to do: embedding, masks, head and loss, multi-token prediction's join.

Shape legend: D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math

from megamoe.model.loss import loss_chunk
from megamoe.planning.attention_cost import is_masked
from megamoe.planning.layer import block_kinds
from megamoe.planning.part_cost import BothWays, Cost, Product, norm_cost
from megamoe.planning.sharding import Setup

CHUNK_OPERATORS = 18  # of each chunk of a head's loss, which makes the gradients too
JOIN_OPERATORS = BothWays(31, 19)  # of multi-token prediction, besides its block and the chunks of its loss


def outside_operators(setup: Setup) -> BothWays:
    """Of a micro-batch, without blocks, chunks of the loss and multi-token prediction."""
    m = setup.model
    windows = {kind.window for kind in block_kinds(m) if is_masked(setup, kind.window)}
    parts = [
        (BothWays(40, 26), True),
        (BothWays(0, -1), not m.tie_word_embeddings),  # one gradient of the embedding
        (BothWays(9, 3), m.router_aux_loss_coef > 0 or m.router_z_loss_coef > 0),  # those of the layers together
        (BothWays(3, 0), m.output_z_loss_coef > 0),
        (BothWays(10, 0) * len(windows), bool(windows)),  # masks
    ]
    return sum((operators for operators, is_there in parts if is_there), BothWays(0, 0))


def head_cost(setup: Setup) -> Cost:
    """One pass over the tokens of head and loss, whose gradients are computed with it: all of it is forward."""
    m, s = setup.model, setup.weight_bytes
    chunk = loss_chunk(setup.tokens, m.vocab_size, setup.on_cpu)
    chunks = math.ceil(setup.tokens / chunk)
    head = Product(chunk, m.vocab_size, m.hidden_size, calls=chunks)
    # Logits become fp32, then probabilities, then their gradient, in place; the weight's gradient is added up in fp32
    # and scaled.
    logits, weight = (2 * s + 40) * setup.tokens * m.vocab_size, (8 + s) * chunks + 14
    operators = BothWays((CHUNK_OPERATORS + 6 * (m.output_z_loss_coef > 0)) * chunks, 0)
    moved = BothWays(logits + weight * m.vocab_size * m.hidden_size, 0)
    return Cost(operators, operators, moved, (head, *head.backward()))


def join_cost(setup: Setup) -> Cost:
    """Three norms, the next tokens' embedding, and the product of both that enters the block of multi-token prediction;
    backward has the embedding's gradient once more."""
    m, s = setup.model, setup.weight_bytes
    size = setup.tokens * m.hidden_size
    product = Product(setup.tokens, m.hidden_size, 2 * m.hidden_size)
    moved = BothWays(6, 9) * (s * size) + BothWays(0, 4) * (s * m.vocab_size * m.hidden_size)
    norms = norm_cost(3 * size, s, setup.on_cpu)
    operators = JOIN_OPERATORS + (norms.operators + BothWays(-1, -1)) * 3
    return Cost(operators, operators, moved + norms.bytes, (product,))
