import itertools

import pytest
import torch
from devices import on_gpus
from torch.autograd import gradcheck

from megamoe.model.dispatch import combine_rows, gather_rows, lay_out, lay_out_received, pick_rows
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


@pytest.mark.parametrize("multiple", [1, 64])
def test_rows_that_come_by_rank_and_expert_are_laid_out_by_expert_and_rank(multiple):
    for sent in ([[3, 0, 2], [0, 0, 4]], [[0, 0, 0], [1, 0, 70]], [[0, 0], [0, 0], [0, 0]], [[5]]):
        counts = torch.tensor(sent)
        ranks, experts = counts.shape
        arrived = torch.arange(experts).repeat(ranks).repeat_interleave(counts.flatten())
        layout = lay_out_received(counts, len(arrived), multiple)
        check_blocks(layout, arrived.tolist(), experts, multiple)


D, K, T = 3, 2, 7


def layout_of_slots(multiple, device="cpu"):
    torch.manual_seed(3)
    return laid_out(torch.randint(4, (T * K,)).to(device), 4, multiple)


# Blocks are filled up on the CPU alone, where the host knows how many rows there are.
PLACES = [("cpu", 1), ("cpu", 5), on_gpus(1, "cuda", 1)]


@pytest.mark.parametrize(("device", "multiple"), PLACES)
def test_gathered_rows_are_the_tokens_rows_and_backward_sums_over_their_places(device, multiple):
    layout = layout_of_slots(multiple, device)
    token = layout.row // K
    x = torch.randn(T, D, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.equal(gather_rows(x, token, layout.place), x[token])
    is_fill = torch.ones(len(token), 1, dtype=torch.float64, device=device).index_fill(0, layout.place, 0)
    # Fill must have no part in the gradient, so it has none in the function that is checked either.
    assert gradcheck(lambda x: gather_rows(x, token, layout.place) * (1 - is_fill), (x,))


@pytest.mark.parametrize(("device", "multiple"), PLACES)
def test_picked_rows_are_in_the_rows_order_and_fill_has_no_gradient(device, multiple):
    layout = layout_of_slots(multiple, device)
    results = torch.randn(len(layout.row), D, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.equal(pick_rows(results, layout.place), results[layout.place])
    assert gradcheck(lambda results: pick_rows(results, layout.place), (results,))


@pytest.mark.parametrize(("device", "multiple"), PLACES)
def test_combined_rows_are_the_weighted_sum_and_both_gradients_are_right(device, multiple):
    layout = layout_of_slots(multiple, device)
    token = layout.row // K
    results = torch.randn(len(layout.row), D, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, device=device, requires_grad=True)
    out = combine_rows(results, weights, token, layout.place)
    for number in range(T):
        expected = sum(weights[number, k] * results[layout.place[number * K + k]] for k in range(K))
        torch.testing.assert_close(out[number], expected)
    assert gradcheck(lambda *inputs: combine_rows(*inputs, token, layout.place), (results, weights))


def test_weights_in_fp32_get_gradients_in_fp32_where_rows_are_of_16_bits():
    layout = layout_of_slots(1)
    results = torch.randn(T * K, D).bfloat16().requires_grad_()
    weights = torch.rand(T, K).requires_grad_()
    combine_rows(results, weights, layout.row // K, layout.place).sum().backward()
    assert weights.grad.dtype == torch.float32
    torch.testing.assert_close(weights.grad, results.detach().float()[layout.place].view(T, K, D).sum(-1))
