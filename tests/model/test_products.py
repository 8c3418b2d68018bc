import pytest
import torch
from devices import DEVICES

from megamoe.model import products
from megamoe.model.products import choose_kernel, grouped_linear

SIZES = {"uneven": [7, 0, 64, 3], "one expert has all": [0, 0, 50, 0], "no row at all": [0, 0, 0, 0]}
I, O = 16, 24  # noqa: E741


@pytest.mark.parametrize(
    ("capability", "dtype", "has_triton", "expected"),
    [
        (None, torch.bfloat16, False, "grouped_mm"),  # CPU
        (None, torch.float32, False, "grouped_mm"),
        (None, torch.float64, False, "loop"),
        ((9, 0), torch.bfloat16, True, "grouped_mm"),  # H100
        ((10, 0), torch.bfloat16, True, "grouped_mm"),
        ((11, 0), torch.bfloat16, True, "triton"),  # Thor, RTX 50xx: torch loops
        ((12, 0), torch.bfloat16, True, "triton"),
        ((9, 0), torch.float16, True, "triton"),
        ((8, 0), torch.bfloat16, True, "triton"),  # A100
        ((8, 0), torch.bfloat16, False, "loop"),
        ((8, 0), torch.float32, True, "loop"),  # Triton's kernel would round to TF32
        ((7, 0), torch.float16, True, "loop"),  # V100
    ],
)
def test_the_product_is_one_kernel_where_there_is_a_correct_one(capability, dtype, has_triton, expected):
    assert choose_kernel(capability, dtype, has_triton) == expected


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("out", [24, 21])  # 21: rows that no kernel takes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_meet_their_experts_weight_and_each_weight_has_a_contiguous_gradient(sizes, out, dtype, device):
    torch.manual_seed(0)
    rows = torch.randn(sum(sizes), I, dtype=torch.float64)
    weight = torch.randn(len(sizes), out, I, dtype=torch.float64)
    grad = torch.randn(sum(sizes), out, dtype=torch.float64)
    low = [one.to(device, dtype).requires_grad_() for one in (rows, weight)]
    result = grouped_linear(*low, torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32))
    result.backward(grad.to(device, dtype))

    exact = [one.detach().cpu().double().requires_grad_() for one in low]
    blocks = [block @ one.T for block, one in zip(exact[0].split(sizes), exact[1], strict=True)]
    torch.cat(blocks).backward(grad.to(dtype).double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    for found, expected in (
        (result, torch.cat(blocks)),
        *zip((a.grad for a in low), (b.grad for b in exact), strict=True),
    ):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=tolerance * 4)
        assert found.is_contiguous()
    for size, one in zip(sizes, low[1].grad, strict=True):
        assert size or not one.any()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_loop_and_the_kernel_agree(sizes, monkeypatch):
    torch.manual_seed(1)
    rows, weight = torch.randn(sum(sizes), I), torch.randn(len(sizes), O, I)
    ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    kernel = grouped_linear(rows, weight, ends)
    monkeypatch.setattr(products, "kernel_for", lambda *_: "loop")
    torch.testing.assert_close(grouped_linear(rows, weight, ends), kernel)
