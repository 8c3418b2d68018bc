"""Batches made ahead of time."""

import contextlib
import threading

import pytest
import torch
from ranks import DEADLINE

from megamoe.data import prefetch
from megamoe.data.batches import Batch
from megamoe.data.prefetch import Prefetcher
from megamoe.utils.errors import UserError

CPU = torch.device("cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefetch.THREAD)]


@pytest.fixture
def start():
    """Makes a Prefetcher that ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda make, device=CPU: stack.enter_context(Prefetcher(make, device))


def test_the_batches_are_those_of_the_step_in_order_from_any_step_on(start):
    batches = start(lambda step: ((step, number) for number in range(3)))
    for step in (7, 8, 9, 4, 5):  # a run may go back
        assert batches.step(step) == [(step, 0), (step, 1), (step, 2)]


def test_the_next_step_is_made_while_this_one_is_used_and_no_more_than_that():
    made, next_is_made = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread()))
        if step == 2:
            next_is_made.set()
        return []

    with Prefetcher(make, CPU) as batches:  # whose end waits for whatever the thread still has to do
        assert not threads()
        batches.step(1)
        assert next_is_made.wait(DEADLINE)
    assert [step for step, _ in made] == [1, 2]
    assert {thread for _, thread in made}.isdisjoint({threading.current_thread()})


def test_an_error_is_raised_as_itself_at_the_step_that_it_belongs_to(start):
    error = UserError("token id 77")

    def make(step):
        if step == 3:
            raise error
        return [step]

    batches = start(make)
    assert [batches.step(1), batches.step(2)] == [[1], [2]]
    with pytest.raises(UserError) as caught:
        batches.step(3)
    assert caught.value is error


def test_an_error_does_not_wait_for_what_the_thread_makes():
    begun, goes_on = threading.Event(), threading.Event()

    def make(step):
        if step == 2:
            begun.set()
            goes_on.wait(DEADLINE)
        return []

    def fail_in_step_1():
        with Prefetcher(make, CPU) as batches:
            batches.step(1)
            assert begun.wait(DEADLINE)
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_step_1()
    assert threads()
    goes_on.set()
    for thread in threads():
        thread.join(DEADLINE)
    assert not threads()


def test_a_gpu_gets_batches_pinned_by_a_thread_of_its_own_and_the_cpu_gets_them_as_they_are(start, monkeypatch):
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    devices = {}  # by thread

    def pin(tensor):  # for want of a GPU
        assert devices[threading.get_ident()] == torch.device("cuda", 1)
        return tensor + 10

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.update({threading.get_ident(): device}))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    (pinned,) = start(lambda step: [batch], torch.device("cuda", 1)).step(1)
    assert (pinned.input_ids.tolist(), pinned.labels.tolist()) == ([[10, 10]], [[11, 11]])
    assert start(lambda step: [batch]).step(1) == [batch]


@pytest.mark.gpu(1)
def test_a_batch_is_in_page_locked_memory(start):
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    (pinned,) = start(lambda step: [batch], torch.device("cuda", 0)).step(1)
    assert pinned.input_ids.is_pinned()
    assert pinned.labels.is_pinned()
