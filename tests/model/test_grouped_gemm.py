import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, assert_near

from megamoe.model import grouped_gemm
from megamoe.model.grouped_gemm import choose_kernel, grouped_linear

SIZES = [7, 0, 64, 3], [0, 0, 50, 0], [0, 0, 0, 0]
FEATURES = 16


def test_the_gemm_of_all_experts_is_one_kernel_where_there_is_a_correct_one():
    half, whole = torch.float16, torch.float32
    for capability, dtype, has_triton, expected in (
        (None, torch.bfloat16, False, "grouped_mm"),  # CPU
        (None, whole, False, "grouped_mm"),
        (None, torch.float64, False, "loop"),
        ((9, 0), torch.bfloat16, True, "grouped_mm"),  # H100
        ((10, 0), torch.bfloat16, True, "grouped_mm_zeroed"),  # B200
        ((10, 3), torch.bfloat16, True, "grouped_mm_zeroed"),
        ((11, 0), torch.bfloat16, True, "triton"),  # Thor, RTX 50xx: torch loops
        ((12, 0), torch.bfloat16, True, "triton"),
        ((9, 0), half, True, "triton"),
        ((8, 0), torch.bfloat16, True, "triton"),  # A100
        ((8, 0), torch.bfloat16, False, "loop"),
        ((8, 0), whole, True, "loop"),  # Triton's kernel would round to TF32
        ((7, 0), half, True, "loop"),  # V100
    ):
        assert choose_kernel(capability, dtype, has_triton) == expected, (capability, dtype, has_triton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_meet_their_experts_weight_and_each_weight_has_a_contiguous_gradient(dtype, device):
    torch.manual_seed(0)
    for sizes, out in itertools.product(SIZES, (24, 21)):  # 21: rows that no kernel takes
        shapes = (sum(sizes), FEATURES), (len(sizes), out, FEATURES), (sum(sizes), out)
        rows, weight, grad = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
        low = [one.to(device).detach().requires_grad_() for one in (rows, weight)]
        result = grouped_linear(*low, torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32))
        # What a kernel leaves unwritten shows, for its memory is that of these.
        _ = [torch.full_like(low[1], math.nan) for _ in range(64)]
        del _
        result.backward(grad.to(device))

        exact = [one.double().detach().requires_grad_() for one in (rows, weight)]
        blocks = [block @ one.T for block, one in zip(exact[0].split(sizes), exact[1], strict=True)]
        torch.cat(blocks).backward(grad.double())
        found, expected = (result, *(one.grad for one in low)), (torch.cat(blocks), *(one.grad for one in exact))
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other, dtype, f"{sizes}, {out}")
            assert one.is_contiguous()
        for size, one in zip(sizes, low[1].grad, strict=True):
            assert size or not one.any()


def test_experts_without_rows_have_gradients_of_zeros_where_the_kernel_leaves_them_unwritten(monkeypatch):
    kernel = F.grouped_mm

    def as_on_sm_100(rows, weight, offs):
        weight, is_empty = weight.view_as(weight), offs.diff(prepend=offs.new_zeros(1)) == 0
        weight.register_hook(lambda grad: grad.masked_fill(is_empty[:, None, None], math.nan))
        return kernel(rows, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", as_on_sm_100)
    monkeypatch.setattr(grouped_gemm, "kernel_for", lambda *_: choose_kernel((10, 0), torch.bfloat16, True))
    torch.manual_seed(0)
    rows, weight = torch.randn(50, FEATURES).bfloat16(), torch.randn(4, 24, FEATURES).bfloat16().requires_grad_()
    for sizes in ([0, 20, 0, 30], [50, 0, 0, 0], [10, 10, 10, 20]):
        ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
        (found,) = torch.autograd.grad(grouped_linear(rows, weight, ends).square().sum(), weight)
        (expected,) = torch.autograd.grad(grouped_gemm._loop(rows, weight, ends).square().sum(), weight)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()
