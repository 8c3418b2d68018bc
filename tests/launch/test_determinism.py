"""`--deterministic`: on a GPU, sums have one order; on CPU, where they always have, nothing changes."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from engines import CONFIG, make, train
from operators import Operators
from ranks import run_alone, run_ranks

from megamoe.launch.determinism import SETTINGS, make_deterministic
from megamoe.model import grouped_gemm as products
from megamoe.training.step import balancer_of


def settings(environment):
    os.environ.update(environment)
    make_deterministic()
    return {name: os.environ[name] for name in SETTINGS}, torch.are_deterministic_algorithms_enabled()


def test_libraries_are_told_in_the_environment_unless_the_user_has_told_them():
    assert run_alone(settings, {}) == (SETTINGS, True)
    assert run_alone(settings, {"NCCL_ALGO": "Tree"}) == ({**SETTINGS, "NCCL_ALGO": "Tree"}, True)


def losses_twice():
    """Of a few steps, without and with, where new memory is filled with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    found = []
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        torch.manual_seed(0)
        config = CONFIG.model_copy(update={"expert_dropout": 0.1, "router_jitter_noise": 0.01})
        found.append(train(make(2, config=config), 3))
    torch.use_deterministic_algorithms(False)
    return found


def test_steps_on_cpu_read_nothing_that_was_not_written_and_have_the_same_losses():
    for without, with_it in run_ranks(2, losses_twice):
        assert without == with_it


@pytest.mark.parametrize(("is_deterministic", "kernel"), [(False, "triton"), (True, "loop")])
def test_a_kernel_whose_tuning_may_come_out_differently_is_left_out(is_deterministic, kernel, monkeypatch):
    triton = SimpleNamespace(is_triton_available=lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_deterministic)
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.ops.triton_ops", triton)
    assert products.kernel_for.__wrapped__(torch.device("cuda"), torch.bfloat16) == kernel


class Dtypes(Operators):
    """Operators by name and the dtype of their first tensor."""

    def _add(self, name, args, *_):
        self.calls[name, next((one.dtype for one in args if isinstance(one, torch.Tensor)), None)] += 1


def operators_of_both_passes():
    """And of balancing after them."""
    from fake_gpu import DEVICE, fake_gpu, model_on_gpu

    changes = {"expert_dropout": 0.1, "router_jitter_noise": 0.01, "gated_mlp": True, "router_bias_rule": "quantile"}
    with fake_gpu():
        model = model_on_gpu(CONFIG.model_copy(update=changes))
        ids = torch.zeros(2, 16, dtype=torch.int64, device=DEVICE)
        balancer = balancer_of(model)
        with Dtypes() as operators:
            model(ids, ids).backward()
            margins = balancer.take_margins().double()
            balancer.apply(balancer.next_loads(balancer.take_counts()), margins)
    return set(operators.calls)


def raising_operators():
    """Of which torch says that they have no repeatable form on a GPU, by name without the class that holds them."""
    (listed,) = re.findall(
        r"throw a\s+:class:`RuntimeError` when ``mode=True``:(.*?)In addition",
        torch.use_deterministic_algorithms.__doc__,
        re.DOTALL,
    )
    return {name.rsplit(".", 1)[1].lower().rstrip("_") for name in re.findall(r"\* :\w+:`(torch\.[\w.]+)`", listed)}


def test_the_passes_of_a_step_on_a_gpu_have_no_operator_without_a_repeatable_form():
    raising, called = raising_operators(), run_alone(operators_of_both_passes)
    assert {"cumsum", "put", "nllloss", "bincount", "histc"} <= raising
    assert len(called) > 40
    names = {(name.replace("_backward", "").replace("_", ""), dtype) for name, dtype in called}
    found = {(name, dtype) for name, dtype in names if any(name.startswith(one.replace("_", "")) for one in raising)}
    # Whole numbers have no rounding, and torch refuses only others.
    assert {name for name, _ in found} <= {"cumsum"}
    assert not any(dtype.is_floating_point for _, dtype in found)
