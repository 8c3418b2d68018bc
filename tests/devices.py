"""Tests that run on a GPU too: the same function on both devices, of which the CPU's case runs everywhere.

`make gpu` runs the other cases. Each has the mark `gpu` with the number of GPUs that it needs.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)


def on_gpus(ranks: int, *values: Any) -> Any:
    """A case of a parametrised test that needs that number of GPUs."""
    return pytest.param(*values, marks=pytest.mark.gpu(ranks))


DEVICES = ["cpu", on_gpus(1, "cuda")]
# By how much of their norm results and gradients may differ from those in float64.
SHARES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.004, torch.bfloat16: 0.03}


def rounded(part: Part, dtype: torch.dtype) -> Part:
    """A copy in float64 whose weights are numbers of `dtype`."""
    return copy.deepcopy(part).to(dtype).double()


def close(found: Any, exact: Any, atol: float = 1e-10) -> None:
    """Check that tensors in float64 are the same but for rounding."""
    torch.testing.assert_close(found, exact, rtol=0, atol=atol)


def assert_near(found: Tensor | None, exact: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Check that a result in `dtype`, on any device, is as near to the one in float64 as that dtype allows."""
    assert found is not None
    assert found.shape == exact.shape
    off, norm = (found.cpu().double() - exact).norm(), exact.norm()
    assert off <= SHARES[dtype] * norm, f"{what} is off by {off / norm:.2g} of its norm"
