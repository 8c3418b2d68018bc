"""What a profiled step comes to: made-up traces of a GPU, and a real one of the CPU."""

import pytest
import torch
from devices import DEVICES
from step_profile import STEP, Total, profile_step, read_trace

HOST, STREAM, OTHER_STREAM = 1, 7, 8


def event(category, name, start, end, thread=HOST):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread}


# A step from 100 to 1,000 us on the host. Nothing runs on the device from 400 to 420 and from 600 to 900.
TRACE = [
    event("user_annotation", "ProfilerStep#1", 90, 1200),
    event("user_annotation", STEP, 100, 1000),
    event("gpu_user_annotation", STEP, 200, 1100, STREAM),
    event("cpu_op", "aten::linear", 110, 190),
    event("cpu_op", "aten::t", 115, 120),
    event("cpu_op", "aten::mm", 120, 180),
    event("cuda_runtime", "cudaLaunchKernel", 150, 160),
    event("cpu_op", "aten::add", 190, 230),
    event("cuda_driver", "cuLaunchKernelEx", 200, 206),
    event("cpu_op", "aten::mul", 195, 210, thread=2),
    event("cuda_runtime", "cudaMemcpyAsync", 300, 310),
    event("cuda_runtime", "cudaEventSynchronize", 310, 610),
    event("cuda_runtime", "cudaStreamSynchronize", 700, 705),
    event("cuda_runtime", "cudaEventSynchronize", 710, 720),
    event("cuda_runtime", "cudaMalloc", 730, 750),
    event("kernel", "mm", 200, 400, STREAM),
    event("kernel", "reduce", 300, 350, OTHER_STREAM),  # at the same time
    event("kernel", "add", 420, 500, STREAM),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 500, 600, STREAM),
    event("gpu_memset", "Memset (Device)", 900, 910, STREAM),
    event("kernel", "late", 910, 1100, STREAM),
    event("cuda_runtime", "cudaDeviceSynchronize", 1010, 1100),  # the profile's own, after the step
    {"ph": "i", "cat": "cpu_op", "name": "instant", "ts": 130, "tid": HOST},
    {"ph": "M", "name": "process_name", "ts": 0},
]


def test_a_trace_of_a_gpu_gives_what_is_busy_idle_and_waited_for():
    found = read_trace(TRACE[::-1])
    assert found == read_trace(TRACE)
    assert found.seconds == pytest.approx(1000e-6)
    assert found.operators == 4  # t, mm, add and mul
    assert found.kernels == 4
    assert found.busy == pytest.approx((200 + 180 + 200) * 1e-6)
    assert found.gaps == Total(2, pytest.approx(320e-6))
    assert found.largest_gap == pytest.approx(300e-6)
    assert found.after_largest_gap == "Memset (Device)"
    assert found.launches == Total(2, pytest.approx(16e-6))
    assert found.waits == {
        "cudaEventSynchronize": Total(2, pytest.approx(310e-6)),
        "cudaMalloc": Total(1, pytest.approx(20e-6)),
        "cudaStreamSynchronize": Total(1, pytest.approx(5e-6)),
    }
    assert found.copies_to_host == Total(1, pytest.approx(100e-6))
    assert found.host == pytest.approx((900 - 335) * 1e-6)
    assert found.host_per_kernel == pytest.approx(found.host / 2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_real_step_has_the_operators_that_it_calls_and_on_a_gpu_their_kernels(device):
    x = torch.ones(3, 3, device=device)
    calls = []

    def step():
        calls.append(1)
        x.sin_()
        x.cos_()
        return x.sum().item()  # on a GPU a copy and a wait

    found = profile_step(step, torch.device(device))
    assert len(calls) == 2
    assert found.seconds >= found.host > 0
    on_gpu = device == "cuda"
    assert found.operators >= 4
    assert found.kernels == (3 if on_gpu else 0)
    assert found.copies_to_host.count == on_gpu
    assert sum(total.count for total in found.waits.values()) == on_gpu
    assert (found.busy > 0, found.gaps.count > 0, found.host_per_kernel > 0) == (on_gpu,) * 3
