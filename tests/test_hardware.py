"""What devices can do: data sheets, and rates measured here."""

import math

import pytest
import torch

from megamoe import hardware
from megamoe.hardware import LARGEST_SQUARE, Peak, measured_flops, memory_gib, peak_flops, square_flops


def test_measured_flops_are_positive_and_finite():
    for dtype in (torch.float32, torch.bfloat16):
        measured = square_flops(torch.device("cpu"), dtype, size=64, rounds=2)
        assert 0 < measured < math.inf


def test_the_measured_flops_are_those_of_the_fastest_round(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])  # rounds of 4, 2 and 3 seconds
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    assert square_flops(torch.device("cpu"), torch.float32, size=8, rounds=3) == 2 * 8**3 / 2


def measured_with(monkeypatch, rates, device="cuda"):
    """(the rate found, the sizes measured) where a square product of each size has one of `rates`, or raises it."""
    sizes = []

    def square(on, dtype, size):
        sizes.append(size)
        rate = rates[len(sizes) - 1]
        if isinstance(rate, Exception):
            raise rate
        return rate

    monkeypatch.setattr(hardware, "square_flops", square)
    return measured_flops(torch.device(device), torch.bfloat16), sizes


@pytest.mark.parametrize(
    ("rates", "found", "sizes"),
    [
        ([100, 150, 151, 900], 151, [1024, 2048, 4096]),  # from there on it does not grow
        ([100, 300, 250, 900], 300, [1024, 2048, 4096]),
        ([100, 300, 700, 800], 800, [1024, 2048, 4096, LARGEST_SQUARE]),
        ([100, 300, torch.OutOfMemoryError()], 300, [1024, 2048, 4096]),
    ],
)
def test_a_gpu_is_measured_where_its_rate_has_stopped_growing(rates, found, sizes, monkeypatch):
    assert measured_with(monkeypatch, rates) == (found, sizes)


def test_a_cpu_is_measured_at_one_size(monkeypatch):
    assert measured_with(monkeypatch, [100, 900], "cpu") == (100, [1024])


def test_a_peak_says_whether_it_was_measured():
    assert str(Peak(989e12, is_measured=False)) == "989 TFLOP/s per rank, of the data sheet"
    assert str(Peak(4.2e11, is_measured=True)) == "0.42 TFLOP/s per rank, measured, of square matrix products"


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
    ],
)
def test_a_known_card_has_the_peak_of_its_data_sheet(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for dtype, peak in ((torch.bfloat16, half), (torch.float16, half), (torch.float32, single)):
        assert peak_flops(torch.device("cuda"), dtype) == Peak(peak, is_measured=False)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA RTX A1000 Laptop GPU"])
def test_the_peak_of_an_unknown_card_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: (device.type, dtype))
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == Peak(("cuda", torch.bfloat16), is_measured=True)


def test_the_peak_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: (device.type, dtype))
    assert peak_flops(torch.device("cpu"), torch.float32) == Peak(("cpu", torch.float32), is_measured=True)


def test_memory_on_cpu_is_what_the_process_holds():
    held = torch.ones(2**26)  # a quarter of a GiB
    assert 0.25 < memory_gib(torch.device("cpu")) < 32
    assert held[0] == 1
