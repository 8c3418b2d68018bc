"""The order of the streams in a step: no memory is reused, read or overwritten while another stream works on it."""

import threading
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from engines import CONFIG, batches, make, train, writer_for
from ranks import run_ranks
from streams import Device, Recorder
from torch.utils._python_dispatch import _disable_current_modes
from toy import SHIPPED, recipe_of, shipped

from megamoe.checkpoint import host_copy
from megamoe.checkpoint.host_copy import HostCopy
from megamoe.data.prefetch import Prefetcher
from megamoe.model import all_to_all
from megamoe.training import step_sums
from megamoe.training.step import build_train_step
from megamoe.utils.device_reads import begin_read

GPU = torch.device("cuda")


class OnGpu(torch.Tensor):
    """Says of itself that it is on a GPU."""

    device = SimpleNamespace(type="cuda")


def read_from_gpu(values):
    return begin_read(values.as_subclass(OnGpu))


def reuse(device, side, is_safe):
    """Memory of the default stream is freed while `side` works on it, and allocated again."""
    values = torch.ones(3)
    side.wait_stream(device.default)
    with device.stream(side):
        values.mul_(2)
    if is_safe:
        values.record_stream(side)
    del values
    torch.ones(3)


def read(device, side, is_safe):
    """The default stream reads what `side` writes; what else it writes there needs no order."""
    values = torch.ones(6)
    side.wait_stream(device.default)
    with device.stream(side):
        values[:3].mul_(2)
    values[3:].mul_(2)
    if is_safe:
        device.default.wait_event(side.record_event())
    values.sum()


@pytest.mark.parametrize("is_safe", [False, True])
@pytest.mark.parametrize("happens", [reuse, read])
def test_what_two_streams_do_to_the_same_memory_is_a_race_unless_it_is_ordered(happens, is_safe):
    device = Device()
    with device.recorded():
        happens(device, device.new_stream(), is_safe)
    assert len(device.races) == (not is_safe)


def races_of_a_collective(waits):
    device = Device()
    with device.recorded():
        values = torch.ones(3)
        work = torch.distributed.all_reduce(values, async_op=True)
        torch.distributed.all_reduce(torch.ones(3))
        if waits:
            work.wait()
        values.sum()
        work.wait()
    return len(device.races)


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_read_before_an_asynchronous_collective_is_waited_for_is_a_race(waits):
    assert run_ranks(1, races_of_a_collective, waits) == [not waits]


def train_step_of(name, ep_size, device):
    ds = shipped(name)
    ds.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2)
    ds["zero_optimization"]["reduce_bucket_size"] = 1000  # below the experts' stacks and most other matrices
    train_step = build_train_step(CONFIG, recipe_of(ds, 2), ep_size=ep_size, ema_decay=0.9)
    zero = train_step.engine.optimizer
    if zero.cpu_offload:
        inner, plain = zero.optimizer, zero.optimizer.step

        def step():  # by DeepSpeed's own code, whose operators torch does not see
            masters = zero.single_partition_of_fp32_groups
            device.run("the optimizer on the host", [one.grad for one in masters], list(masters))
            plain()

        inner.step = step
    return train_step


def races_of_steps(name, ep_size):
    """In three steps of two micro-batches from pinned memory, with averaged weights."""
    device = Device()
    with device.recorded(), ExitStack() as stack:
        for module in (all_to_all, step_sums):
            stack.enter_context(patch.object(module, "begin_read", read_from_gpu))
        prefetcher = stack.enter_context(Prefetcher(lambda step: batches(step, 2, 1), GPU))
        train_step = train_step_of(name, ep_size, device)
        for number in range(3):
            train_step.forward_backward(prefetcher.step(number))
            assert train_step.update().applied
    return device.races


# With 2, each rank has experts of its own, which are not reduced.
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.json")))
def test_every_shipped_recipe_orders_what_its_streams_do_to_the_same_memory(name, ep_size):
    assert run_ranks(2, races_of_steps, name, ep_size) == [[], []]


def races_of_a_save(folder):
    """The next forward and backward pass runs before the thread that saves copies the state."""
    device, passes = Device(), threading.Event()
    taken, take_plain, allocate_plain = device.new_stream(), HostCopy.take, HostCopy._allocate

    def take(*args):
        passes.wait()
        with Recorder(device), patch.object(torch.Tensor, "is_cuda", True):
            copies = take_plain(*args)
        taken.wait_stream(device.host)
        return copies

    def allocate(copy, tensors):
        with _disable_current_modes(), patch.object(host_copy, "pin_memory"):
            has_room = allocate_plain(copy, tensors)
        device.memory(copy._memory).on_host = True
        return has_room

    with device.recorded(), patch.multiple(HostCopy, take=take, _allocate=allocate):
        engine = make(2)
        writer = writer_for(engine, folder)
        train(engine, 2)
        with patch.object(engine, "device", GPU):
            writer.save(2)
        wait_for_copy = writer.before_update

        def before_update():
            passes.set()
            wait_for_copy()
            device.host.wait_stream(taken)

        writer.before_update = before_update
        train(engine, 2, 2, writer)
        assert writer.complete()
    return device.races


def test_a_save_copies_the_state_of_its_step_and_the_next_update_waits_for_that(tmp_path):
    assert run_ranks(2, races_of_a_save, tmp_path / "checkpoints") == [[], []]
