"""The kernels that attention takes on a GPU: what is asked for shown without one, what is taken by `make gpu`."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from model_parts import model_of
from operators import Operators
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import _cur_sdpa_kernel_backends

from megamoe.model import attention_kernels
from megamoe.model.attention import attend
from megamoe.model.attention_kernels import activate_flash_attention, describe_attention
from megamoe.model.document_attention import DocumentMask
from megamoe.model.document_attention import attend as attend_documents

BF16, FP32 = torch.bfloat16, torch.float32
OTHERS = ["EFFICIENT_ATTENTION", "MATH"]
CASES = {  # dtype, heads of keys, widths of keys and of values, whether masked: the kernels in order
    "causal": (BF16, 2, 64, 64, False, ["FLASH_ATTENTION", *OTHERS]),
    "narrower values": (BF16, 4, 192, 128, False, ["CUDNN_ATTENTION", *OTHERS]),
    "fp32": (FP32, 2, 64, 64, False, OTHERS),
    "masked": (BF16, 2, 64, 64, True, OTHERS),
}


def tensors(dtype, groups, width, of_value, masked, device):
    query, key, value = (
        torch.randn(2, heads, 128, size, device=device).to(dtype)
        for heads, size in ((4, width), (groups, width), (groups, of_value))
    )
    window = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=device).tril().triu(1 - 16)
    return query, key, value, window if masked else None


@pytest.mark.parametrize("case", CASES)
def test_torch_is_asked_for_the_kernel_of_each_dtype_width_and_mask(case, monkeypatch):
    *given, expected = CASES[case]
    asked = []

    def kernel(query, key, value, **_):
        asked.append(([one.name for one in _cur_sdpa_kernel_backends(with_priority=True)], key.shape[1]))
        return value.new_empty(*query.shape[:3], value.shape[-1])

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with FakeTensorMode():
        attend(*tensors(*given, "cuda"))
    assert asked == [(expected, given[1] if expected[0] != OTHERS[0] else 4)]  # that kernel has no groups
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_that_kernel_is_taken(case, device):
    *given, order = CASES[case]
    query, key, value, mask = tensors(*given, device)
    taken = order[: 1 + order[0].startswith("CUDNN")]  # which not every GPU has for all widths
    if device == "cpu":
        value, taken = F.pad(value, (0, key.shape[-1] - value.shape[-1])), ["flash_attention_for_cpu"]
    with Operators() as operators:
        attend(query, key, value, mask)
    assert sum(operators.calls[f"_scaled_dot_product_{name.lower()}"] for name in taken) == 1


@pytest.mark.gpu(1)
def test_a_window_on_a_gpu_is_one_kernel_without_a_mask_and_equals_the_masked_one():
    query, key, value, mask = tensors(BF16, 2, 64, 64, True, "cuda")
    with Operators() as operators:
        found = attend_documents(query, key, value, DocumentMask.of_rows(2, 128, torch.device("cuda"), 16))
    assert not operators.calls["_scaled_dot_product_efficient_attention"]
    torch.testing.assert_close(found, attend(query, key, value, mask), rtol=0.02, atol=0.02)


def test_a_run_says_what_its_layers_take():
    varying = "FLASH_ATTENTION for sequences of varying lengths"
    for part, documents, dtype, said in (
        ("plain_scores", True, BF16, varying),
        ("plain_scores", True, FP32, "EFFICIENT_ATTENTION, called for each document"),
        ("sliding_multi_token", False, BF16, f"{varying} in layers with a window of 7; FLASH_ATTENTION"),
    ):
        config = model_of(part, document_attention=documents)
        line = describe_attention(config, torch.device("meta"), dtype, 64)
        assert line == f"attention: {said} (flash attention is torch's own)"
        assert describe_attention(config, torch.device("cpu"), dtype, 64) is None


def test_flash_attentions_package_is_taken_on_the_gpus_and_for_the_heads_that_it_is_made_for(monkeypatch):
    tried = []

    def activate(name):
        tried.append((name, major, width))
        raise ModuleNotFoundError(name)  # which is no problem

    monkeypatch.setattr(attention_kernels, "activate_flash_attention_impl", activate)
    for device, major, width in itertools.product(("cuda", "cpu"), (8, 9, 10, 12), (128, 256, 288)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        activate_flash_attention(SimpleNamespace(head_dim=width, value_dim=64), torch.device(device))
    assert tried == [("FA3", 9, 128), ("FA3", 9, 256), ("FA4", 10, 128)]
