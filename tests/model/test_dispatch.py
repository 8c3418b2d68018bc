import itertools

import pytest
import torch

from megamoe.model.dispatch import combine_rows, lay_out
from megamoe.model.router import count_ids


def laid_out(group_ids, groups, multiple):
    return lay_out(group_ids, count_ids(group_ids, groups), multiple)


def check_blocks(layout, group_of_row, groups, multiple):
    """Each group's rows are one block, in their own order, filled up to the multiple."""
    rows = len(group_of_row)
    ends = layout.ends.tolist()
    assert layout.ends.dtype == torch.int32
    assert len(ends) == groups
    assert len(layout.row) == (ends[-1] if groups else 0)
    start = 0
    for group, end in enumerate(ends):
        members = [row for row in range(rows) if group_of_row[row] == group]
        assert (end - start) % multiple == 0
        assert len(members) <= end - start < len(members) + multiple
        assert layout.row[start : start + len(members)].tolist() == members
        assert [int(layout.place[row]) for row in members] == list(range(start, start + len(members)))
        start = end
    assert rows == 0 or 0 <= layout.row.min() <= layout.row.max() < rows


@pytest.mark.parametrize("multiple", [1, 3, 64])
def test_rows_of_a_group_are_one_block_in_their_own_order(multiple):
    for groups, rows in itertools.product((1, 4, 7), (0, 1, 2, 17, 100)):
        torch.manual_seed(rows)
        group_ids = torch.randint(groups, (rows,))
        check_blocks(laid_out(group_ids, groups, multiple), group_ids.tolist(), groups, multiple)


def test_weights_in_fp32_get_gradients_in_fp32_where_rows_are_of_16_bits():
    tokens, top_k, width = 7, 2, 3
    torch.manual_seed(3)
    layout = laid_out(torch.randint(4, (tokens * top_k,)), 4, 1)
    results = torch.randn(tokens * top_k, width).bfloat16().requires_grad_()
    for groups in (top_k, torch.arange(0, tokens * top_k, top_k)):
        weights = torch.rand(tokens, top_k).requires_grad_()
        combine_rows(results, weights, layout.row // top_k, layout.place, groups).sum().backward()
        assert weights.grad.dtype == torch.float32
        expected = results.detach().float()[layout.place].view(tokens, top_k, width).sum(-1)
        torch.testing.assert_close(weights.grad, expected)
