"""Bytes of one layer's experts: rows on their way there, inside and back, forward and backward.

What is kept and what comes and goes is that of `model/moe.py`, `dispatch.py`, `grouped_gemm.py` and `experts.py`.

Shape legend: D hidden_size, F expert_size, E experts, K choices, R = tokens * K rows that a rank sends and, under
balance, gets; P places of rows at the experts, fill included; s bytes of a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megamoe.config.model import ModelConfig
from megamoe.model.dispatch import CPU_ROW_MULTIPLE
from megamoe.model.names import is_engine_expert
from megamoe.planning.buckets import Ledger, Reduction
from megamoe.planning.sharding import Setup


@dataclass(frozen=True)
class ExpertBytes:
    """Bytes that the experts of one layer keep from forward to backward, and the most that comes and goes meanwhile."""

    rows: int  # one tensor of the rows on this rank (R, D)
    result: int  # one tensor of the rows as the experts see them (P, D)
    inside: int  # one tensor inside the experts (P, F)
    indices: int  # of the rows' way there and back
    hidden: int  # all that is kept inside the experts
    mask: int  # of dropout
    returned: int  # the experts' results, for the gradient of the combine weights
    moving: int  # temporaries of forward

    @property
    def kept(self) -> int:
        """From forward to backward."""
        return self.indices + self.result + self.hidden + self.mask + self.returned


def expert_bytes(setup: Setup) -> ExpertBytes:
    """Bytes of a layer's experts under balance."""
    m, s = setup.model, setup.weight_bytes
    exchanged = setup.ep_size > 1
    filled = places(setup)
    rows, result, inside = (
        s * count * width
        for count, width in ((setup.rows, m.hidden_size), (filled, m.hidden_size), (filled, m.expert_size))
    )
    hidden = inside * tensors_inside(m)
    mask = (s if setup.on_cpu else 1) * filled * m.hidden_size if m.expert_dropout else 0
    returned = rows if exchanged else result
    # In int64, kept: the token at each place, the place of each row; and with an exchange, the place where it is run.
    indices = 8 * (3 * setup.rows if exchanged else filled + setup.rows)
    # What has a name until the layer returns: the rows at each place.
    named = 8 * filled + (8 * setup.rows if exchanged else 0)
    moving = max(
        # The results of each token, weighted, and their sum.
        2 * rows + s * setup.tokens * m.hidden_size,
        # Dropout's input and its random numbers, before the results have come back.
        result + 2 * filled * m.hidden_size - (returned if exchanged else 0) if mask and setup.on_cpu else 0,
        # ReLU's input and output, before there are results.
        2 * inside - hidden - mask - returned - (result if exchanged else 0),
    )
    return ExpertBytes(rows, result, inside, indices, hidden, mask, returned, moving + named)


def places(setup: Setup) -> int:
    """Places of rows at a layer's experts on this rank, fill included."""
    m, per_expert = setup.model, setup.rows // setup.experts_per_rank
    if setup.on_cpu and m.num_experts_per_tok == m.num_local_experts:
        per_expert = math.ceil(per_expert / CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE
    elif setup.on_cpu:
        per_expert += (CPU_ROW_MULTIPLE - 1) // 2  # counts differ from expert to expert: the mean of the fill
    return per_expert * setup.experts_per_rank


def tensors_inside(model: ModelConfig) -> int:
    """Tensors (P, F) that are kept: of products, their input; of activations, their input, but ReLU's output."""
    if model.gated_mlp:
        return 4  # gate and what it gates are one tensor, then the activation, and the product of both
    return 1 if model.hidden_act == "relu" else 2


# --- backward -------------------------------------------------------------------------------------------------------

GRADIENTS, TEMPORARIES, ACTIVATIONS = "gradients of activations", "temporaries", "activations"


def experts_backward(setup: Setup, experts: ExpertBytes, ledger: Ledger, reduction: Reduction, prefix: str) -> None:
    """From the gradient of a layer's output to that of the experts' input.

    Args:
        prefix: of the block's parameters in the engine.
    """
    up, down = (name for name in reduction.group_of if is_engine_expert(name) and name.startswith(prefix))
    returning = experts.returned
    ledger.transient(TEMPORARIES, 2 * returning)  # gradients of the results, and products for the weights'
    ledger.free(ACTIVATIONS, returning)
    if setup.ep_size > 1:
        ledger.transient(TEMPORARIES, experts.rows + max(experts.rows, experts.result))  # exchanged, laid out
    ledger.allocate(GRADIENTS, experts.result)
    if experts.mask:
        ledger.transient(TEMPORARIES, experts.result)
        ledger.free(ACTIVATIONS, experts.mask)
    is_relu = setup.model.hidden_act == "relu" and not setup.model.gated_mlp  # keeps its output, as the product does
    _product_backward(setup, ledger, reduction, down, experts.inside, experts.result, 0 if is_relu else experts.inside)
    activation_backward(
        setup.model, experts.inside, ledger, experts.inside if is_relu else experts.hidden - experts.inside
    )
    gradient = 2 * experts.inside if setup.model.gated_mlp else experts.inside
    _product_backward(setup, ledger, reduction, up, experts.result, gradient, experts.result)
    ledger.transient(TEMPORARIES, 2 * experts.rows)  # going back, in order of the tokens
    ledger.free(GRADIENTS, experts.result)
    ledger.free(ACTIVATIONS, experts.indices)


def _product_backward(
    setup: Setup, ledger: Ledger, reduction: Reduction, name: str, by_rows: int, gradient: int, kept: int
) -> None:
    """Both gradients of a product of rows with the parameter `name`.

    Args:
        by_rows: bytes of the gradient that goes on.
        gradient: bytes of the one that came.
        kept: bytes of the rows, where nothing else keeps them.
    """
    weight = setup.weight_bytes * reduction.size(name)
    ledger.allocate(GRADIENTS, by_rows)
    ledger.transient(TEMPORARIES, weight)
    ledger.free(GRADIENTS, gradient)
    ledger.free(ACTIVATIONS, kept)
    if setup.kernel == "loop":
        ledger.transient(TEMPORARIES, 2 * weight)  # of each expert, then stacked
    reduction.ready(name)
    if setup.kernel == "loop":
        ledger.transient(TEMPORARIES, by_rows)  # of each expert, then joined


def activation_backward(model: ModelConfig, inside: int, ledger: Ledger, kept: int) -> None:
    """The gradient behind the first product, which takes the place of that before the second."""
    if model.gated_mlp:
        ledger.allocate(GRADIENTS, 2 * inside)  # of both factors
        ledger.free(GRADIENTS, inside)
        ledger.free(ACTIVATIONS, inside)  # the activation
        ledger.transient(TEMPORARIES, inside)  # of the gate
        ledger.free(ACTIVATIONS, kept - inside)
        ledger.transient(TEMPORARIES, 2 * inside)  # both, joined
    else:
        ledger.transient(TEMPORARIES, inside)
        ledger.free(ACTIVATIONS, kept)
