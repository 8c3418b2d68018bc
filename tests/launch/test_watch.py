"""Where a rank is. That a job ends when a rank dies is in tests/launchers."""

import contextlib
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import DistError, HashStore
from toy import PRESET

from megamoe.config import ModelConfig
from megamoe.launch import watch
from megamoe.launch.exits import FAILED, LOST
from megamoe.launch.rank_info import RankInfo
from megamoe.launch.rendezvous import Member, Rendezvous
from megamoe.launch.watch import MAX_SECONDS_BETWEEN_CHECKS, Position, StallTimer, Watch
from megamoe.model.decoder import Decoder


class Recorder(Position):
    def __init__(self):
        self.places = []
        super().__init__()

    def at(self, activity, step=None):
        super().at(activity, step)
        self.places.append(str(self))


def places(recompute_blocks=0):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**PRESET), recompute_blocks=recompute_blocks)
    position = Recorder()
    position.follow(model.layers)
    position.at("reading data", 7)
    ids = torch.arange(16).unsqueeze(0)
    model(ids, ids).backward()
    return position.places


def test_a_step_is_followed_through_the_layers_forward_and_back():
    assert places() == [
        "step 7, reading data",
        "step 7, forward of layer 0",
        "step 7, forward of layer 1",
        "step 7, backward of layer 1",
        "step 7, backward of layer 0",
    ]


def test_a_recomputed_layer_is_followed_too():
    assert "step 7, forward of layer 0" in places(recompute_blocks=1)[4:]


def test_following_a_model_changes_neither_loss_nor_gradients():
    def run(follow):
        torch.manual_seed(0)
        model = Decoder(ModelConfig(**PRESET))
        if follow:
            Position().follow(model.layers)
        ids = torch.arange(16).unsqueeze(0)
        loss = model(ids, ids)
        loss.backward()
        return [loss, *(parameter.grad for parameter in model.parameters())]

    assert all(torch.equal(one, other) for one, other in zip(run(True), run(False), strict=True))


def clocked(monkeypatch, *checks):
    """What a StallTimer returns at (seconds, value) pairs of a clock."""
    now = iter([0.0, *(seconds for seconds, _ in checks)])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    timer = StallTimer()
    return [timer.seconds(value) for _, value in checks]


def test_a_stall_is_the_time_since_a_value_changed(monkeypatch):
    assert clocked(monkeypatch, (1, "a"), (2, "a"), (4, "a"), (5, "b"), (6, "b")) == [0, 1, 3, 0, 1]


def test_time_in_which_the_process_was_suspended_is_no_stall(monkeypatch):
    assert clocked(monkeypatch, (1, "a"), (2, "a"), (9000, "a"), (9001, "a")) == [
        0,
        1,
        1 + MAX_SECONDS_BETWEEN_CHECKS,
        7,
    ]


# --- a rank that fails ----------------------------------------------------------------------------------------------


def what_a_failing_rank_does(monkeypatch, store, error):
    """What rank 1 of 2 does, in order."""
    done = []

    class Output:
        def write(self, text):
            done.extend(["says why"] if "a bug" in text else ["says that rank 0 died"] if "rank 0" in text else [])

        def flush(self):
            pass

    def leave(code):
        done.append(code)
        raise SystemExit

    monkeypatch.setattr(watch, "HEARTBEAT_SECONDS", 600)  # the threads do nothing
    monkeypatch.setattr(watch, "_local_ranks", lambda rendezvous: {})
    monkeypatch.setattr(watch, "end_groups", lambda failed: done.append(f"aborts {failed}"))
    monkeypatch.setattr(watch, "leave", leave)
    monkeypatch.setattr(sys, "stderr", Output())
    members = [Member("h1", number, "here", {}, None) for number in range(2)]
    one = Watch(Rendezvous(RankInfo(1, 2, 1, 2, "h1", 1, "none"), members, store), Position())
    monkeypatch.setattr(one, "_wait_for_readers", lambda: done.append("tells the others"))
    with contextlib.suppress(SystemExit):
        one.fail(error)
    return done


def test_a_rank_that_fails_says_why_tells_the_others_aborts_its_collectives_and_leaves(monkeypatch):
    done = what_a_failing_rank_does(monkeypatch, HashStore(), KeyError("a bug"))
    assert done == ["says why", "tells the others", "aborts True", FAILED]


@pytest.mark.parametrize("error", [KeyError("a bug"), torch.OutOfMemoryError("a bug")])
def test_the_trace_of_an_error_is_not_lost_with_rank_0(error, monkeypatch):
    def lose(*_):
        raise DistError("connection reset")

    store = SimpleNamespace(set=lambda *_: None, compare_set=lose)
    done = what_a_failing_rank_does(monkeypatch, store, error)
    assert done == ["says why", "says that rank 0 died", LOST]
