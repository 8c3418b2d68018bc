"""What attention gives a device to do.

A mask makes `F.scaled_dot_product_attention` take another kernel than plainly causal attention has: it computes the
scores of all positions, those that the mask hides too, and on a GPU each query head gets keys and values of its own.

Shape legend: D hidden_size, H query heads, G key/value heads, d head_dim, n and r the parts of it that are not rotated
and that are, v the width of a value.
"""

from __future__ import annotations

from megamoe.planning.part_cost import NONE, BothWays, Cost, Product, norm_cost, total
from megamoe.planning.sharding import Setup


def attention_cost(setup: Setup, window: int | None) -> Cost:
    """Attention of a block, from the normed input to the output projection.

    Args:
        window: positions that a query sees; None for all before it.
    """
    return _latent(setup, window) if setup.model.kv_lora_rank else _grouped_query(setup, window)


def is_masked(setup: Setup, window: int | None) -> bool:
    """Whether attention gets a mask."""
    return window is not None and window < setup.seq_len


def _grouped_query(setup: Setup, window: int | None) -> Cost:
    m, s, tokens = setup.model, setup.weight_bytes, setup.tokens
    positions = setup.micro_batch * (setup.seq_len + m.num_latent_tokens)
    query, key = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    products = (
        Product(positions, query, m.hidden_size),
        Product(positions, key, m.hidden_size, calls=2),
        Product(positions, m.hidden_size, query),
    )
    # Backward adds up what the three projections' input gets, and puts the output's gradient in its place in a zero.
    cost = Cost(BothWays(5, 12), BothWays(5, 10), BothWays(0, 8) * (s * tokens * m.hidden_size), products)
    cost += _rotation(setup, query + key, calls=2)
    cost += _attended(setup, window, m.head_dim + m.head_dim)
    if m.num_latent_tokens:
        cost += Cost(BothWays(1, 1))
    for width in (query, key) if m.qk_norm else ():
        cost += norm_cost(tokens * width, s, setup.on_cpu)
    if m.attention_bias:  # added within the product
        cost += Cost(BothWays(0, 3), BothWays(0, 3), BothWays(0, 1) * (s * tokens * (query + 2 * key)))
    return cost + _out_bias(setup)


def _latent(setup: Setup, window: int | None) -> Cost:
    m, s, tokens = setup.model, setup.weight_bytes, setup.tokens
    heads, rope, compressed = m.num_attention_heads, m.rotary_dim, m.kv_lora_rank or 0
    nope, query, values = m.head_dim - rope, heads * m.head_dim, heads * m.value_dim
    products = (
        *_queries(setup),
        Product(tokens, compressed + rope, m.hidden_size),
        Product(tokens, heads * nope + values, compressed),
        Product(tokens, m.hidden_size, values),
    )
    # Forward joins the heads' keys with the rotated one. Backward joins the gradients of what was split, adds up those
    # of the rotated key over the heads, and those of the input.
    forward = 2 * query
    backward = 3 * m.hidden_size + 2 * (heads * nope + values) + 2 * (compressed + rope) + heads * rope
    parts = [
        Cost(BothWays(6, 13), BothWays(6, 13), BothWays(forward, backward) * (s * tokens), products),
        norm_cost(tokens * compressed, s, setup.on_cpu),
        _rotation(setup, query, calls=1),
        Cost(BothWays(3, 3), BothWays(1, 1), BothWays(7, 7) * (s * tokens * rope)),  # of the one key
        _attended(setup, window, m.head_dim + max(m.value_dim, m.head_dim if setup.on_cpu else 0)),
        _values_for_the_kernel(setup) if not is_masked(setup, window) else Cost(),
        _out_bias(setup),
    ]
    if m.q_lora_rank:
        parts += [Cost(BothWays(1, 2), BothWays(1, 2)), norm_cost(tokens * m.q_lora_rank, s, setup.on_cpu)]
    if m.attention_bias:
        widths = [compressed + rope, *([m.q_lora_rank] if m.q_lora_rank else [])]
        biases = BothWays(0, len(widths))
        parts.append(Cost(biases, biases, BothWays(0, 1) * (s * tokens * sum(widths))))
    return total(*parts)


def _queries(setup: Setup) -> list[Product]:
    m, query = setup.model, setup.model.num_attention_heads * setup.model.head_dim
    if m.q_lora_rank is None:
        return [Product(setup.tokens, query, m.hidden_size)]
    return [Product(setup.tokens, m.q_lora_rank, m.hidden_size), Product(setup.tokens, query, m.q_lora_rank)]


def _values_for_the_kernel(setup: Setup) -> Cost:
    """Values as wide as keys on CPU, contiguous ones on a GPU."""
    m, s = setup.model, setup.weight_bytes
    values, keys = m.num_attention_heads * m.value_dim, m.num_attention_heads * m.head_dim
    if not setup.on_cpu:
        return Cost(BothWays(1, 0), BothWays(1, 0), BothWays(2, 0) * (s * setup.tokens * values))
    if values == keys:
        return Cost()
    # Padded; the rest of the result is cut off. Backward pads with zeros.
    moved = BothWays(2 * keys + 2 * values, 3 * keys)
    return Cost(BothWays(3, 1), BothWays(2, 1), moved * (s * setup.tokens))


def _rotation(setup: Setup, width: int, calls: int) -> Cost:
    """RoPE of queries and keys, `width` numbers of a token in `calls` tensors."""
    share = setup.model.rotary_dim / setup.model.head_dim
    if share == 1:
        operators, passes = BothWays(3, 3), BothWays(7, 7)
    else:  # the table is padded with ones; one member of the pairs after the other
        operators, passes = BothWays(4, 3), BothWays(2 + 3 * share, 2 + 3 * share)
    moved = passes * (setup.weight_bytes * setup.tokens * width)
    return Cost(operators * calls, BothWays(1, 1) * calls, moved)


def _attended(setup: Setup, window: int | None, widths: int) -> Cost:
    """The scores and the sums of values, one kernel each way. Backward computes the scores again.

    Args:
        widths: of a key and of a value together.
    """
    m, s = setup.model, setup.weight_bytes
    masked = is_masked(setup, window)
    visible = setup.seq_len if masked else setup.seq_len / 2 + m.num_latent_tokens  # half of them: causal
    flops = 2.0 * setup.tokens * visible * m.num_attention_heads * widths
    attention = BothWays(flops, 2.5 * flops)
    if not masked:
        return Cost(attention=attention)
    # The mask becomes numbers; the queries' gradient is put in its place in a zero.
    query = s * setup.tokens * m.num_attention_heads * m.head_dim
    operators, moved = BothWays(3, 2), BothWays(0, 4) * query + BothWays((1 + s) * setup.seq_len**2, 0)
    groups = m.num_attention_heads // m.num_key_value_heads
    if groups > 1 and not setup.on_cpu:
        operators, moved = operators + BothWays(2, 2), moved + BothWays(2, 2) * ((1 + 1 / groups) * query)
    return Cost(operators, operators, moved, attention=attention)


def _out_bias(setup: Setup) -> Cost:
    m = setup.model
    bias = BothWays(0, m.attention_out_bias)
    return Cost(bias, bias, bias * (setup.weight_bytes * setup.tokens * m.hidden_size)) if bias != NONE else Cost()
