import functools
import os
import subprocess
import sys

import pytest

REUSE = """
import resource, torch
from megamoe.training.cpu import share_cores
print(share_cores())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2**24, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


GIVE_BACK = """
import torch
from megamoe.training.cpu import give_back_freed_memory, share_cores
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
share_cores()
tensors = [torch.ones(2**20, dtype=torch.uint8) for _ in range(200)]
last = torch.ones(2**20, dtype=torch.uint8)  # above them in the heap, so that they cannot simply be cut off
full = resident()
del tensors
kept = resident()
give_back_freed_memory()
print(full - kept, full - resident())
"""


@functools.cache
def words_and_faults(**environment):
    """What share_cores says in a new process, and the pages that twenty tensors of 16 MiB then need."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "LOCAL_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", REUSE], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    words, faults = done.stdout.splitlines()
    return words, int(faults)


def test_the_memory_of_freed_tensors_is_used_again():
    words, faults = words_and_faults()
    assert "freed memory kept" in words
    assert faults < 100


@pytest.mark.parametrize(
    "setting", [{"MALLOC_MMAP_THRESHOLD_": "1048576"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}]
)
def test_an_allocator_that_the_environment_sets_up_is_left_alone(setting):
    words, faults = words_and_faults(**setting)
    assert "allocator as it is" in words
    assert faults > 150  # glibc maps each again: 8 pages of 2 MiB where the system gives such, else 4,096


def test_freed_memory_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())  # pages fewer
    assert before < 1000
    assert after > 40_000  # of 51,200


def test_ranks_share_the_cores_unless_they_are_told():
    cores = len(os.sched_getaffinity(0))
    assert f" {cores} thread" in words_and_faults()[0]
    assert f" {max(cores // 2, 1)} thread" in words_and_faults(LOCAL_WORLD_SIZE="2")[0]
    assert " 1 thread per rank" in words_and_faults(OMP_NUM_THREADS="1")[0]
