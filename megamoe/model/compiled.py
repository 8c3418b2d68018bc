"""A block whose work around the experts' GEMMs is compiled: regions without a break, which all blocks share.

On a GPU every operator is a kernel that the host has to launch and whose operands pass through memory; a region needs
few of both. The experts' GEMMs and the all-to-all between ranks stay outside: each is one kernel or one call already,
of as many rows as the routing makes.

Shape legend: B batch, S positions, T tokens (B * S), D hidden_size, K choices, E experts, P places, fill included,
F intermediate_size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamoe.model.all_to_all import lay_out_sends
from megamoe.model.dispatch import combine_rows, spread_rows
from megamoe.model.document_attention import DocumentMask, Mask
from megamoe.model.experts import StackedExperts
from megamoe.model.moe import sum_of_entropies
from megamoe.model.rope import Rotary
from megamoe.model.router_losses import Padding

# Each kind of mask is compiled by itself, with and without padding, and once more for other lengths of samples.
RECOMPILES = 64


class CompiledBlock:
    """Runs the blocks of one model in training. A region is compiled at its first call, which takes seconds, and serves
    all blocks and numbers of rows.

    The results are those of eager blocks to rounding, with the same random numbers: torch's own operators draw them.
    """

    def __init__(self) -> None:
        self.whole = compile_region(whole, 3)
        self.before_experts = compile_region(before_experts, 3, 4)
        self.with_shared = compile_region(lambda block, *inputs: block.with_shared(*inputs))
        self.activate = compile_region(StackedExperts.activate, 1)
        self.combine = compile_region(combine_rows, 0, 1, 2, 3, 4)
        self.after_experts = compile_region(after_experts, 1, 2, 3, 5)

    def __call__(
        self, block: Any, x: Tensor, rotary: Rotary, mask: Mask, used: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D) and the router's losses, as `block` without cache."""
        given: Rotary | None = rotary
        if isinstance(mask, DocumentMask) and not mask.is_one_call:  # no region depends on the documents' lengths
            x, given, mask = x + block.self_attn(block.input_layernorm(x), rotary, mask), None, None
        if block.is_dense:
            return self.whole(block, x, given, mask), None
        dispatch = block.moe.deepspeed_moe

        def experts(rows: Tensor, ends: Tensor) -> Tensor:
            if not dispatch.experts.gated:  # an activation alone is one operator, cheaper than the call of a region
                return dispatch.experts(rows, ends)
            return dispatch.experts(rows, ends, lambda inside: self.activate(dispatch.experts, inside))

        x, hidden, weights, losses, balancing, placed = self.before_experts(block, x, given, mask, used)
        dispatch.count_for_balancing(*balancing)
        if hidden is None:
            rows, layout = placed
            return self.after_experts(x, experts(rows, layout.ends), weights, layout.row, layout.place, used), losses
        rows = hidden.flatten(0, 1) if used is None else hidden.flatten(0, 1).index_select(0, used)

        def alongside() -> Tensor:
            return x if block.shared_mlp is None else self.with_shared(block, x, hidden)

        out, added = dispatch.run_on_ranks(rows, weights, balancing[0], placed, experts, alongside, self.combine)
        out = out if used is None else spread_rows(out, used, hidden.shape[:2].numel())
        return added + out.view_as(added), losses


def compile_region(function: Callable[..., Any], *with_rows: int) -> Callable[..., Any]:
    """`function` as one region.

    Args:
        with_rows: arguments whose number of rows changes from call to call; it may be 0 or 1. Of a `DocumentMask`, its
            tensors; None and other masks stay as they are.
    """
    region = torch.compile(function, fullgraph=True)

    def call(*args: Any) -> Any:
        if torch._dynamo.config.recompile_limit != RECOMPILES:  # is this thread's own; backward on a GPU has another
            torch._dynamo.config.recompile_limit = RECOMPILES
        for argument in map(args.__getitem__, with_rows):
            for one in argument if isinstance(argument, DocumentMask) else [argument]:
                if isinstance(one, Tensor) and one.dim() < 4:
                    torch._dynamo.decorators.mark_unbacked(one, 0)
        return region(*args)

    return call


def whole(block: Any, x: Tensor, rotary: Rotary | None, mask: Mask) -> Tensor:
    """A dense block, (B, S, D) -> (B, S, D); without `rotary`, attention is added already."""
    if rotary is not None:
        x = x + block.self_attn(block.input_layernorm(x), rotary, mask)
    return x + block.mlp(block.post_attention_layernorm(x))


def before_experts(block: Any, x: Tensor, rotary: Rotary | None, mask: Mask, used: Tensor | None) -> tuple[Any, ...]:
    """x (B, S, D) with attention and the shared experts added, None, the router's weights and losses, what
    `count_for_balancing` takes, and the rows by expert. Nothing else is written to memory.

    Where other ranks have experts: x without the shared ones, the same normed, ..., and what is sent of it."""
    if rotary is not None:
        x = x + block.self_attn(block.input_layernorm(x), rotary, mask)
    hidden = block.post_attention_layernorm(x)
    rows, padding = hidden.flatten(0, 1), None
    if used is not None:
        torch._check(len(used) > 0)  # every row of a batch has tokens
        rows, padding = rows.index_select(0, used), Padding(used, len(rows))
    dispatch, routing = block.moe.deepspeed_moe, block.moe.router(rows, len(hidden), padding)
    balancing = routing.counts, sum_of_entropies(routing.log_scores), routing.margins
    if dispatch.topology.ep_size > 1:
        sends = lay_out_sends(routing.expert_ids, dispatch.topology)
        return x, hidden, routing.weights, routing.losses, balancing, sends
    # On CPU the host reads how many rows are filled in.
    with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
        placed = dispatch.place(rows, routing.expert_ids, routing.counts)
    return block.with_shared(x, hidden), None, routing.weights, routing.losses, balancing, placed


def after_experts(
    x: Tensor, results: Tensor, weights: Tensor, token: Tensor, place: Tensor, used: Tensor | None
) -> Tensor:
    """x (B, S, D) with the weighted results (P, D) added; the other arguments as in `combine_rows`."""
    out = combine_rows(results, weights, token, place, weights.shape[1])
    return x + out.view_as(x) if used is None else x.flatten(0, 1).index_add(0, used, out).view_as(x)


def compiler_problems(device: torch.device) -> list[str]:
    """What this host lacks to compile for a device, one sentence each."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton_package

        if not has_triton_package():
            return ["--compile needs Triton on a GPU, which cannot be imported; install it, or leave --compile out."]
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # as Triton looks for one
            return ["--compile needs a C compiler on a GPU; install gcc, set CC, or leave --compile out."]
        return []
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        name = os.environ.get("CXX", "g++")
        return [f"--compile needs a C++ compiler on CPU, and {name} does not run; set CXX, or leave --compile out."]
    return []
