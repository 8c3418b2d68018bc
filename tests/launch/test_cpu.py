"""Threads and memory of a rank on CPU."""

import os

import pytest
import torch
from ranks import run_alone

from megamoe.launch.cpu import give_back_freed_memory, keep_freed_memory, share_cores


def words(*environments):
    """What share_cores says in each."""
    said = []
    for environment in environments:
        for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        os.environ.update(environment)
        torch.set_num_threads(1)
        said.append(share_cores())
    return said


def test_ranks_share_the_cores_unless_they_are_told():
    cores = len(os.sched_getaffinity(0))
    alone, of_two, told = run_alone(words, {}, {"LOCAL_WORLD_SIZE": "2"}, {"OMP_NUM_THREADS": "1"})
    assert f" {cores} thread" in alone
    assert "freed memory kept" in alone
    assert f" {max(cores // 2, 1)} thread" in of_two
    assert " 1 thread per rank" in told


@pytest.mark.parametrize(
    "setting", [("MALLOC_MMAP_THRESHOLD_", "1048576"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1048576")]
)
def test_an_allocator_that_the_environment_sets_up_is_left_alone(setting, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)  # has no mallopt
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "allocator as it is" in share_cores()
    monkeypatch.undo()
    monkeypatch.setenv(*setting)
    assert not keep_freed_memory()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


def kept_and_given_back():
    """Pages fewer when many tensors are freed, and when their memory is given back."""
    assert keep_freed_memory()
    tensors = [torch.ones(2**20, dtype=torch.uint8) for _ in range(200)]
    last = torch.ones(2**20, dtype=torch.uint8)  # above them in the heap, so that they cannot simply be cut off
    full = resident()
    del tensors
    kept = resident()
    give_back_freed_memory()
    return full - kept, full - resident(), len(last)


def test_freed_memory_is_kept_until_it_is_given_back():
    before, after, _ = run_alone(kept_and_given_back)
    assert before < 1000
    assert after > 40_000  # of 51,200
