"""A block whose work between the experts' products and exchanges is compiled: three regions, which all blocks share.

On a GPU every operator is a kernel whose launch the host pays for and whose operands pass through memory; a region has
few of both. Products of experts and collectives stay outside, for their row counts change with every batch, and each of
them is one kernel or one call already.

Shape legend: B batch, S positions, T tokens (B * S), D hidden_size, K choices, E experts, F intermediate_size, P places,
fill included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked

from megamoe.model.dispatch import combine_rows
from megamoe.model.moe import Results
from megamoe.model.rope import Rotary


class CompiledBlock:
    """Runs any block of one model in training. Compilation begins with the first call, takes seconds for each region,
    and is not repeated for other blocks or row counts.

    Random numbers are drawn as without compilation, from torch's generator, so only rounding differs.
    """

    def __init__(self) -> None:
        self._attend_and_route = _compiled(attend_and_route)
        self._activate = _compiled(lambda block, projected: block.moe.experts.activate(projected))
        self._combine = _compiled(combine)

    def __call__(self, block: Any, x: Tensor, rotary: Rotary) -> Tensor:
        """What `block` gives for `x` (B, S, D) without padding or cache: (B, S, D)."""

        def experts(rows: Tensor, ends: Tensor) -> Tensor:
            return block.moe.experts(rows, ends, lambda projected: self._activate(block, _any_rows(projected)))

        x, rows, weights, expert_ids, counts = self._attend_and_route(block, x, rotary)
        results = block.moe.deepspeed_moe.run_experts(rows, expert_ids, counts, experts)
        return self._combine(x, weights, Results(_any_rows(results.rows), _any_rows(results.token), results.place))


def attend_and_route(block: Any, x: Tensor, rotary: Rotary) -> tuple[Tensor, ...]:
    """All before the experts: x with attention added (B, S, D), its normed rows (T, D), and the routing of these:
    weights (T, K), expert ids (T, K), counts (E,)."""
    x = x + block.self_attn(block.input_layernorm(x), rotary)
    rows = block.post_attention_layernorm(x).flatten(0, 1)
    return x, rows, *block.moe.router(rows)


def combine(x: Tensor, weights: Tensor, results: Results) -> Tensor:
    """All after the experts: x (B, S, D) plus their weighted results."""
    return x + combine_rows(results.rows, weights, results.token, results.place).view_as(x)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, options={"fallback_random": True})


def _any_rows(x: Tensor) -> Tensor:
    """`x`, for a region to take any number of its rows, 0 and 1 included, for the same."""
    mark_unbacked(x, 0)
    return x
