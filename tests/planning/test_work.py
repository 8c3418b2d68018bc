from megamoe.planning.work import Gemm


def test_a_gemm_has_the_operations_and_bytes_of_all_its_groups():
    gemm = Gemm(rows=32, columns=7, inside=5, groups=3)
    assert gemm.flops == 3 * 2 * 32 * 7 * 5
    assert gemm.bytes(2) == 2 * 3 * (32 * 5 + 5 * 7 + 32 * 7)
