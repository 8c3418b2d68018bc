"""Host memory for what is saved: as much as the tensors take, page-locked for those of a GPU, and kept."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from megamoe.checkpoint import host_copy
from megamoe.checkpoint.host_copy import ALIGNMENT, HostCopy


class OnGpu(torch.Tensor):
    """Says of itself that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def locks(monkeypatch):
    """[address, bytes] of memory that is page-locked."""
    held = {}

    def lock(address, size, flags):
        held[address] = size
        return 0

    cudart = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=lambda address: held.pop(address) * 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in held)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    return held


def on_gpu(*sizes):
    return [torch.randn(size).as_subclass(OnGpu) for size in sizes]


def test_the_page_locked_memory_is_as_large_as_the_tensors_and_no_power_of_two(locks):
    tensors = [*on_gpu(1000, 33), torch.arange(5)]
    copies = HostCopy().take(tensors, None)
    (size,) = locks.values()
    total = sum(tensor.nbytes for tensor in tensors)
    assert total <= size < total + len(tensors) * ALIGNMENT
    assert all(copy.equal(tensor.as_subclass(torch.Tensor)) for copy, tensor in zip(copies, tensors, strict=True))
    assert all(copy.data_ptr() % copy.itemsize == 0 for copy in copies)


def test_memory_is_kept_for_the_same_shapes_and_unlocked_before_others_take_its_place(locks):
    copy = HostCopy()
    first = copy.take(on_gpu(1000), None)[0].data_ptr()
    assert copy.take(on_gpu(1000), None)[0].data_ptr() == first
    copy.take(on_gpu(3000), None)
    assert list(locks.values()) == [12_032]


def test_memory_that_cannot_be_page_locked_gives_no_copy_and_is_said_and_tried_once(locks, monkeypatch, capsys):
    monkeypatch.setattr(host_copy.dist, "get_rank", lambda: 0)
    tries = []
    refuse = SimpleNamespace(cudaHostRegister=lambda *_: tries.append(1) or 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuse)
    copy = HostCopy()
    for _ in range(2):
        assert copy.take(on_gpu(1000), None) is None
    assert capsys.readouterr().out.count("no memory for copies of what is saved") == 1
    assert len(tries) == 1


def test_all_ranks_of_the_host_must_have_room_for_a_copy(locks, monkeypatch):
    monkeypatch.setattr(host_copy.dist, "get_rank", lambda: 1)
    for available, has_room in ((2 * 1.25 * 4096, True), (2 * 1.25 * 4096 - 1, False)):
        memory = psutil.virtual_memory()._replace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert (HostCopy().take(on_gpu(1024), None) is not None) == has_room
