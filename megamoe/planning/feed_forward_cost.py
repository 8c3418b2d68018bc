"""What the second half of a block gives a device to do: a dense MLP, or router, experts and shared experts.

Shape legend: D hidden_size, E experts, K choices; rows of the experts have a width D outside and expert_size inside.
"""

from __future__ import annotations

from megamoe.planning.expert_layer import places
from megamoe.planning.part_cost import NONE, BothWays, Cost, Product, total
from megamoe.planning.sharding import Setup


def mlp_cost(setup: Setup, width: int) -> Cost:
    """One MLP of that width for all tokens."""
    m, s, tokens = setup.model, setup.weight_bytes, setup.tokens
    up = Product(tokens, width, m.hidden_size, calls=2 if m.gated_mlp else 1)
    products, inside, outside = (
        (up, Product(tokens, m.hidden_size, width)),
        s * tokens * width,
        s * tokens * m.hidden_size,
    )
    if not m.gated_mlp:
        return Cost(BothWays(3, 5), BothWays(3, 5), BothWays(2, 3) * inside, products)
    # The gate's gradient and the other's meet at the input.
    moved = BothWays(5, 9) * inside + BothWays(0, 3) * outside
    return Cost(BothWays(5, 10), BothWays(4, 8), moved, products)


def shared_cost(setup: Setup) -> Cost:
    """The shared experts, added to the residual stream."""
    m, outside = setup.model, setup.weight_bytes * setup.tokens * setup.model.hidden_size
    if not m.n_shared_experts:
        return Cost()
    cost = mlp_cost(setup, m.shared_size) + Cost(BothWays(1, 1), NONE, BothWays(3, 3) * outside)
    if m.shared_expert_gate:
        gate = Product(setup.tokens, 1, m.hidden_size)
        cost += Cost(BothWays(3, 7), BothWays(1, 3), BothWays(2, 9) * outside, (gate,))
    return cost


def router_cost(setup: Setup) -> Cost:
    """The router with its losses."""
    m, s, tokens = setup.model, setup.weight_bytes, setup.tokens
    wide, outside, scores = 4 * tokens * m.hidden_size, s * tokens * m.hidden_size, 4 * tokens * m.num_local_experts
    is_sigmoid, balance = m.router_score == "sigmoid", m.router_aux_loss_coef > 0
    by_log_scores = m.norm_topk_prob or balance  # the gradient comes this way
    # Products, scores, choices, their weights, counts and entropy; their input in fp32, and passes over the scores.
    cost = Cost(BothWays(12, 5), BothWays(10, 8), BothWays(2, 3.5) * wide + BothWays(10, 6) * scores)
    parts = [
        (Cost(BothWays(2, 2), NONE, BothWays(1, 1) * outside), s < 4),  # casts
        (Cost(BothWays(1, 0), NONE, BothWays(2, 0) * scores), m.router_bias),
        (Cost(BothWays(8, 0), BothWays(3, 0), BothWays(9, 0) * scores), m.counts_margins),
        (Cost(BothWays(1, 0)), m.norm_topk_prob),
        (Cost(BothWays(1, is_sigmoid * by_log_scores), NONE, BothWays(2, 3) * scores), is_sigmoid),
        (Cost(BothWays(1, 1)), m.routed_scaling_factor != 1),
        (Cost(BothWays(6, 0), BothWays(3, 0), BothWays(4, 0) * scores), m.topk_group < m.n_group),
        (Cost(BothWays(3, 1), NONE, BothWays(7, 3) * wide), m.router_jitter_noise > 0),
        (_losses(setup, scores), balance or m.router_z_loss_coef > 0),
    ]
    return total(cost, *(part for part, is_there in parts if is_there))


def _losses(setup: Setup, scores: float) -> Cost:
    """Balance loss and z-loss.

    Args:
        scores: bytes of those of all tokens.
    """
    m, kind = setup.model, setup.model.router_aux_loss_type
    cost = Cost(BothWays(2, 0), BothWays(1, 0))  # a zero, and both together
    if m.router_aux_loss_coef:
        several = kind == "sequence" and setup.micro_batch > 1  # a sum that is not one over all tokens
        operators = BothWays(5, 4) if kind == "global_batch" else BothWays(8, 4 + several)
        cost += Cost(operators, BothWays(3, 1), BothWays(3, 6 + 2 * several) * scores)
    if m.router_z_loss_coef:
        cost += Cost(BothWays(4, 8), BothWays(1, 1), BothWays(1, 8) * scores)
    return cost


def experts_cost(setup: Setup) -> Cost:
    """The routed experts, with the rows' way there and back."""
    m, s, exchanged = setup.model, setup.weight_bytes, setup.ep_size > 1
    experts, filled = setup.experts_per_rank, places(setup)
    groups, calls = (1, experts) if setup.kernel == "loop" else (experts, 1)
    up = m.expert_size * (2 if m.gated_mlp else 1)
    products = (
        Product(filled / experts, up, m.hidden_size, groups, calls),
        Product(filled / experts, m.hidden_size, m.expert_size, groups, calls),
    )
    outside, chosen, inside = (s * size for size in (
        setup.tokens * m.hidden_size, filled * m.hidden_size, filled * m.expert_size))  # fmt: skip
    # Gathered, weighted, summed; the activation.
    moved = BothWays(2, 5) * outside + BothWays(6, 10) * chosen + BothWays(2, 3) * inside
    cost = Cost(BothWays(13, 15), BothWays(11, 12), moved, products)
    dropout = Cost(BothWays(6, 1), NONE, BothWays(11, 3) * chosen) if setup.on_cpu else Cost(
        BothWays(1, 1), NONE, BothWays(2.5, 2.5) * chosen)  # a CPU draws the mask itself  # fmt: skip
    parts = [
        (dropout, m.expert_dropout > 0),
        (Cost(BothWays(1, 3), BothWays(2, 2), BothWays(3, 10) * inside), m.gated_mlp),
        (Cost(BothWays(1, 0)), s < 4),  # a cast of the weights
        (Cost(BothWays(26, 7), BothWays(22, 7), BothWays(4, 7) * chosen), exchanged),  # laid out by expert once more
        (Cost(BothWays(7 if exchanged else 11, 0)), setup.on_cpu),  # rows are rounded up
        # Two products, for each expert one forward and two backward, not one kernel; split and joined again.
        (Cost(BothWays(2 * experts, 4 * experts + 2)), setup.kernel == "loop"),
    ]
    return total(cost, *(part for part, is_there in parts if is_there))
