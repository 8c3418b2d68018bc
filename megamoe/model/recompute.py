"""What backward recomputes of a block: all of it, or the operators whose results cost little for their bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megamoe.config.run import Recompute

ATTENTION = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
}


def run_recomputed(block: Callable[..., Any], how: Recompute, *inputs: Any) -> Any:
    """`block(*inputs)`, which keeps the inputs for backward, and what `_policy` says where `how` is "selective"."""
    if how == "whole":
        return checkpoint(block, *inputs, use_reentrant=False)
    # Rows that arrive from other ranks are written into memory that was kept when it was made.
    contexts = partial(create_selective_checkpoint_contexts, _policy, allow_cache_entry_mutation=True)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **_: Any) -> CheckpointPolicy:
    """Kept: results of attention, of experts' GEMMs unless they are wider than what is multiplied, and the memory in
    which rows arrive, with the all-to-all that writes it; counts are sent again. What is kept and not asked for stays
    in memory for good, for the handle of an all-to-all holds its tensors.

    In compiled regions attention's alone is kept: the compiler may write over those of other operators.
    """
    name = operator._schema.name
    kept = name in ATTENTION
    if name == "aten::_grouped_mm":
        inside, columns = args[1].shape[-2:]
        kept = columns <= inside
    elif name == "aten::new_empty":
        kept = context.op_output.is_kept = context.op_output.is_floating_point()
    elif name == "c10d::alltoall_base_":
        kept = getattr(args[0], "is_kept", False)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
