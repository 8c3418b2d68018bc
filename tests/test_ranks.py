"""The processes that tests share: a call finds them as new, and a failure is told with its cause."""

import os
import random
import signal

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from ranks import RankPool, run_ranks


def leave_traces():
    """What a call finds; then change all of it."""
    found = (
        dist.get_rank(),
        dist.get_world_size(),
        [random.random(), np.random.rand(), torch.rand(1).item()],
        os.environ.get("TRACE"),
        torch.get_num_threads(),
        signal.getsignal(signal.SIGTERM),
        list(groups._get_expert_parallel_group_dict()),
    )
    os.environ["TRACE"] = "1"
    torch.set_num_threads(2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    groups._create_expert_and_data_parallel(dist.get_world_size())
    dist.barrier()  # a rank that leaves takes the connections of one that is not done
    return *found, os.getpid()


def test_a_call_finds_nothing_of_the_one_before_in_the_same_processes():
    pool = RankPool()
    try:
        (*first, pid), (*second, other) = pool.run(2, leave_traces, ())
        assert [first[:2], second[:2]] == [[0, 2], [1, 2]]
        (*again, same_pid), _ = pool.run(2, leave_traces, ())
        assert (again, same_pid) == (first, pid)
        assert pid != other
    finally:
        pool.end()


def fail_on_rank_1(kind):
    if dist.get_rank() == 1:
        if kind == "exit":
            os._exit(3)
        raise ValueError("the cause")
    if kind == "hang":
        signal.pause()
    dist.barrier()


def test_a_rank_that_fails_is_named_with_the_cause_and_the_next_call_has_new_ranks(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 1)
    for kind, says in (("exit", "exit code 3"), ("hang", "rank 1: .*the cause.*\nrank 0 hangs")):
        with pytest.raises(AssertionError, match=f"(?s)(?=.*{says})rank 1: "):
            run_ranks(2, fail_on_rank_1, kind)
    assert run_ranks(2, dist.get_rank) == [0, 1]


def refused_at_first(folder):
    if dist.get_rank() == 1 and not (folder / "again").exists():
        (folder / "again").touch()
        raise RuntimeError("Gloo connectFullMesh failed with ... Connection refused")
    return (folder / "again").exists()


def test_a_call_whose_further_groups_do_not_form_is_repeated(tmp_path):
    with pytest.warns(UserWarning, match="refused_at_first is called again"):
        assert run_ranks(2, refused_at_first, tmp_path)[1]
