"""The grouped GEMM of rows with the weights of their experts: one kernel for all experts where there is one.

Shape legend: P rows, grouped by expert, E experts of this rank, I input and O output features.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.utils.device_reads import begin_read

Kernel = Literal["grouped_mm", "grouped_mm_zeroed", "triton", "loop"]
DESCRIPTIONS: dict[Kernel, str] = {
    "grouped_mm": "one kernel for all experts (torch.nn.functional.grouped_mm)",
    "grouped_mm_zeroed": "one kernel for all experts (torch.nn.functional.grouped_mm), and zeros for the gradients of "
    "those without rows, which it leaves unwritten on this GPU",
    "triton": "one kernel for all experts (DeepSpeed's, in Triton)",
    "loop": "a loop over the experts, which waits for the device in every layer",
}

ROW_ALIGNMENT = 16  # bytes that a row of each operand is a multiple of (torch.nn.functional.grouped_mm)


def choose_kernel(capability: tuple[int, int] | None, dtype: torch.dtype, has_triton: bool) -> Kernel:
    """The fastest correct kernel on this device in this dtype.

    Args:
        capability: of a CUDA device; None elsewhere.

    On GPUs `torch.nn.functional.grouped_mm` is one kernel for bf16 on sm_9x and sm_10x; else it is a loop that reads
    the device (aten/src/ATen/native/GroupedMMUtils.h). DeepSpeed's Triton kernel serves 16 bits from sm_80 on; in fp32
    it would round its operands to TF32. The loop is exact in any dtype, and reads the device once per GEMM. On sm_10x
    torch's kernel leaves the weight gradients of groups without rows unwritten (pytorch issues 172439, 193633).
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "loop"
    if capability is None or (capability[0] in (9, 10) and dtype == torch.bfloat16):
        return "grouped_mm_zeroed" if capability and capability[0] == 10 else "grouped_mm"
    if has_triton and capability >= (8, 0) and dtype in (torch.bfloat16, torch.float16):
        return "triton"
    return "loop"


@lru_cache
def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """`choose_kernel` for a device of this host."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if torch.version.hip:
        capability = (8, 0)  # torch loops on AMD's GPUs, whatever number they give; Triton runs there
    has_triton = False
    if capability:
        from deepspeed.ops.triton_ops import is_triton_available

        # Its tuning, by what it measures, may choose another order of sums at the next start.
        has_triton = is_triton_available() and not torch.are_deterministic_algorithms_enabled()
    return choose_kernel(capability, dtype, has_triton)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (P, I) times each row's expert's weight, (P, O). An expert without rows gets a gradient of zeros.

    A loop where rows are not multiples of ROW_ALIGNMENT bytes, which a run refuses but an older model may have.

    Args:
        weight: (E, O, I), as one expert's `nn.Linear` has it.
        ends: (E,) int32, where each expert's rows end; the last is P.
    """
    kernel = kernel_for(rows.device, rows.dtype)
    width = math.gcd(*weight.shape[1:]) * rows.dtype.itemsize
    if not len(rows) or width % ROW_ALIGNMENT:
        kernel = "loop"
    if kernel == "grouped_mm_zeroed" and weight.requires_grad:
        is_empty = (ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None]
        weight = weight.view_as(weight)  # whose hook sees this product's gradient alone
        weight.register_hook(lambda grad: grad.masked_fill(is_empty, 0))
    if kernel in ("grouped_mm", "grouped_mm_zeroed"):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    if kernel == "triton":
        from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton

        return group_gemm_triton(rows, weight, ends, trans_b=True)
    return _loop(rows, weight, ends)


def _loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    bounds = [0, *(begin_read(ends)() if len(rows) else [0] * len(ends))]
    blocks = rows.split([end - start for start, end in itertools.pairwise(bounds)])
    return torch.cat([F.linear(block, one) for block, one in zip(blocks, weight.unbind(), strict=True)])
