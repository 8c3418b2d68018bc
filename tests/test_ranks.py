"""The processes that tests share: a failure is told with its cause."""

import os
import signal

import pytest
import ranks
import torch.distributed as dist
from ranks import run_ranks


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
