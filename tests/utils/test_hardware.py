"""What devices can do: data sheets, and rates measured here."""

import math

import pytest
import torch

from megamoe.utils import hardware
from megamoe.utils.hardware import Peak, measured_flops, peak_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_flops_are_positive_and_finite_and_draw_nothing_from_torch(dtype):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert 0 < measured_flops(torch.device("cpu"), dtype) < math.inf
    assert torch.rand(1) == expected


@pytest.mark.parametrize("rate", [0.1e9, 0.56e9, 5e9, 46e9, 1e12, 0])
def test_a_measurement_takes_less_than_half_a_second_at_any_rate(monkeypatch, rate):
    now, sizes = 0.0, []

    def gemm_seconds(a):
        nonlocal now
        if not rate:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")  # no kernel for the dtype
        sizes.append(len(a))
        now += 2 * len(a) ** 3 / rate
        return 2 * len(a) ** 3 / rate

    monkeypatch.setattr(hardware, "_gemm_seconds", gemm_seconds)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now)
    assert measured_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(rate)
    assert now < 0.5
    assert rate < 46e9 or sizes[-1] == 1024


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
    ],
)
def test_a_known_card_has_the_peak_of_its_data_sheet(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for dtype, peak in ((torch.bfloat16, half), (torch.float16, half), (torch.float32, single)):
        assert peak_flops(torch.device("cuda"), dtype) == Peak(peak, is_measured=False)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA RTX A1000 Laptop GPU", "Tesla V100-SXM2-16GB"])
def test_the_bf16_peak_of_an_unknown_card_or_one_without_bf16_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: (device.type, dtype))
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == Peak(("cuda", torch.bfloat16), is_measured=True)
