from collections import Counter

from megamoe.planning.work import Product, Work


def test_a_product_has_the_operations_and_bytes_of_all_its_groups():
    product = Product(rows=32, columns=7, inside=5, groups=3, calls=2)
    assert product.flops == 2 * 3 * 2 * 32 * 7 * 5
    assert product.bytes(2) == 2 * 3 * (32 * 5 + 5 * 7 + 32 * 7)


def test_work_adds_up():
    part = Work(1, 2, Counter({Product(2, 3, 4): 5}), 6, 7)
    assert part + part == Work(2, 4, Counter({Product(2, 3, 4): 10}), 12, 14)
