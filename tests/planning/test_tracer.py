import torch
from torch import nn

from megamoe.planning.tracer import Tracer
from megamoe.planning.work import Gemm


def test_operators_gemms_and_the_bytes_of_the_others_are_counted():
    rows, weight = torch.empty(6, 8, device="meta"), torch.empty(8, 4, device="meta")
    index = torch.empty(6, 1, dtype=torch.int64, device="meta")
    tracer = Tracer(fill=5)
    with tracer:
        tracer.begin("forward", "tensors")
        gemm = rows @ weight
        sums = (gemm + gemm).view(24)  # reads both, and writes
        picked = gemm.gather(1, index)  # reads an index of 8 bytes for each number that it writes
        assert int(sums[0]) == 5
    work = tracer.work["forward"]
    assert work.operators == 4
    assert work.gemms == {Gemm(rows=6, columns=4, inside=8): 1}
    assert work.bytes == 3 * gemm.nbytes + index.nbytes + picked.nbytes


def test_work_until_an_exchange_is_waited_for_is_counted_by_itself_too():
    rows, tracer = torch.empty(6, 8, device="meta"), Tracer(fill=0)
    with tracer:
        tracer.begin("forward", "tensors")
        _ = rows + rows, rows @ rows.T
        for _ in range(2):
            tracer.exchanges += 1
            _, tracer.exchanges = rows @ rows.T, tracer.exchanges - 1
            _ = rows * rows
    assert tracer.work["forward"].operators == 6
    assert tracer.meanwhile["forward"].gemms == {Gemm(rows=6, columns=6, inside=8): 2}
    assert tracer.meanwhile["forward"].operators == 2


def test_grouped_gemms_are_those_of_each_group_both_ways():
    rows = torch.empty(64, 16, device="meta", requires_grad=True)
    weight = torch.empty(4, 32, 16, device="meta", requires_grad=True)
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    tracer = Tracer(fill=0)
    with tracer:
        tracer.begin("forward", "tensors")
        out = nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        tracer.begin("backward", "tensors")
        out.sum().backward()
    assert tracer.work["forward"].gemms == {Gemm(16, 32, 16, groups=4): 1}
    assert tracer.work["backward"].gemms == {Gemm(16, 16, 32, groups=4): 1, Gemm(32, 16, 16, groups=4): 1}


def test_the_gradient_of_each_parameter_is_an_event_at_which_it_is_gone():
    first, second = (nn.Linear(8, 8, bias=False, device="meta") for _ in range(2))
    model, rows = nn.Sequential(first, second), torch.empty(16, 8, device="meta")
    tracer, size, gradient = Tracer(fill=0), 4 * 16 * 8, 4 * 8 * 8
    tracer.watch(model)
    tracer.ignore(rows)
    with tracer:
        tracer.begin("forward", "kept")
        loss = model(rows).sum()
        tracer.mark("end")
        tracer.begin("backward", "made")
        loss.backward()
    (end,) = tracer.events["forward"]
    assert end.level["kept"] == size + 4  # what enters the second, and the loss
    assert end.peak["kept"] == 2 * size + 4
    of_second, of_first = tracer.events["backward"]
    assert (of_second.name, of_first.name) == ("1.weight", "0.weight")
    assert of_first.level["kept"] == 4
    assert of_first.peak["made"] >= gradient > of_first.level["made"]
