"""Which kernels a model's attention takes on a GPU: FlashAttention's package, and what a run says of them."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

from megamoe.config.model import ModelConfig
from megamoe.model.attention import kernel_order
from megamoe.model.document_attention import takes_lengths

# By the first number of a GPU's capability: torch's name for the package that is made for it, and its widest head.
PACKAGES = {9: ("FA3", 256), 10: ("FA4", 128)}


def activate_flash_attention(config: ModelConfig, device: torch.device) -> None:
    """Let torch call FlashAttention 3 (Hopper) or 4 (B200) for its own version 2, where that package is there and takes
    the heads of the model."""
    if device.type != "cuda" or torch.version.hip:
        return
    name, widest = PACKAGES.get(torch.cuda.get_device_capability(device)[0], ("", 0))
    if max(config.head_dim, config.value_dim) <= widest:
        with contextlib.suppress(ImportError, RuntimeError):  # there is none, or none for this torch
            activate_flash_attention_impl(name)


def describe_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype, longest: int) -> str | None:
    """The kernels that layers take on a GPU, in rows of up to `longest` tokens; None on a CPU, which has one."""
    if device.type == "cpu":
        return None
    query = torch.empty(1, config.head_dim, dtype=dtype, device=device)
    found = []
    for window in sorted({config.window(block) or longest for block in range(config.num_hidden_layers)}):
        where = f" in layers with a window of {window}" if window < longest else ""
        if (where or config.document_attention) and takes_lengths(query, max(config.head_dim, config.value_dim)):
            kernel = "FLASH_ATTENTION for sequences of varying lengths"
        else:
            kernel = kernel_order(query, config.value_dim, is_masked=bool(where))[0].name
            kernel += ", called for each document" * config.document_attention
        found.append(kernel + where)
    version = current_flash_attention_impl() or "torch's own"
    return f"attention: {'; '.join(found)} (flash attention is {version})"
