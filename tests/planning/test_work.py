from collections import Counter

from megamoe.planning.work import Gemm, Work


def test_a_gemm_has_the_operations_and_bytes_of_all_its_groups():
    gemm = Gemm(rows=32, columns=7, inside=5, groups=3)
    assert gemm.flops == 3 * 2 * 32 * 7 * 5
    assert gemm.bytes(2) == 2 * 3 * (32 * 5 + 5 * 7 + 32 * 7)


def test_work_adds_up():
    part = Work(1, 2, Counter({Gemm(2, 3, 4): 5}), 6, 7)
    assert part + part == Work(2, 4, Counter({Gemm(2, 3, 4): 10}), 12, 14)
