from dataclasses import replace

import pytest

from megamoe.planning.rates import GPU, GROUP, KERNEL, PACKING, gemm_seconds
from megamoe.planning.work import Gemm
from megamoe.utils.data_sheets import DEVICES, Device

H100 = DEVICES["h100"]
TILE = 128 * 256


def share(gemm):
    """Of the peak FLOP/s of an H100 in bf16."""
    return gemm.flops / gemm_seconds(gemm, H100, GPU, 2) / H100.half_flops


def test_the_largest_gemms_come_near_the_share_that_is_assumed():
    assert 0.74 < share(Gemm(16384, 16384, 16384)) < GPU.gemms


def test_a_row_more_is_a_tile_more_and_a_tile_more_a_wave():
    # Two groups, 8 tiles wide: 8 tiles high they are 128 tiles for 132 multiprocessors, 9 high 144, 16 high 256.
    one, two, full = (
        gemm_seconds(Gemm(rows, 2048, 8192, groups=2), H100, GPU, 2) - KERNEL
        for rows in (8 * 128, 8 * 128 + 1, 16 * 128)
    )
    assert two == pytest.approx(2 * one)
    assert two == pytest.approx(full)


def test_the_inner_dimension_of_few_tiles_is_split():
    deep = gemm_seconds(Gemm(256, 256, 2**16), H100, GPU, 2)
    in_one_piece = 2 * TILE * 2**16 / (H100.half_flops * GPU.gemms / 132)
    assert deep < in_one_piece / 4


def test_a_gemm_takes_at_least_its_bytes():
    one = Gemm(1, 8192, 8192)
    assert gemm_seconds(one, H100, GPU, 2) > one.bytes(2) / H100.memory_rate


def test_on_cpu_bytes_and_operations_add_up():
    cpu = Device("CPU", 4e11, 1e11, 1e10, 2e10, 1e9, 1e9, 1e9, 1e9)
    one = Gemm(100, 200, 300, groups=2)
    expected = one.flops / (4e11 * 0.5) + PACKING * one.bytes(2) / 2e10 + 2 * GROUP * GPU.operator
    assert gemm_seconds(one, cpu, replace(GPU, gemms=0.5, memory=1.0), 2) == pytest.approx(expected)
