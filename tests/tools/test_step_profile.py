"""What a profiled step comes to."""

import pytest
import torch
from devices import DEVICES
from step_profile import profile_step


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
