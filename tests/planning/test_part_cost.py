from megamoe.planning.part_cost import BothWays, Cost, Product, total


def test_backward_has_both_gradients_of_a_product():
    product = Product(rows=32, columns=7, inside=5, groups=3, calls=2)
    by_rows, by_weight = product.backward()
    assert (by_rows.rows, by_rows.columns, by_rows.inside) == (32, 5, 7)
    assert (by_weight.rows, by_weight.columns, by_weight.inside) == (7, 5, 32)
    assert by_rows.flops == by_weight.flops == product.flops == 2 * 3 * 2 * 32 * 7 * 5
    assert product.bytes(2) == 2 * 3 * (32 * 5 + 5 * 7 + 32 * 7)


def test_equal_parts_cost_as_much_as_one_so_many_times():
    part = Cost(BothWays(1, 2), BothWays(3, 4), BothWays(5, 6), (Product(2, 3, 4),), BothWays(7, 8))
    assert part.times(3) == total(part, part, part)
