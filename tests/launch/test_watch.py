"""Where a rank is, and how ranks learn that one died. That a job ends then is in tests/launchers."""

import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from benchmark_ranks import CountedStore
from ranks import DEADLINE
from torch.distributed import DistError, HashStore
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.launch.codes import LOST
from megamoe.launch.rank_info import RankInfo
from megamoe.launch.rendezvous import Rendezvous
from megamoe.launch.watch import MAX_SECONDS_BETWEEN_CHECKS, Intervals, Position, StallTimer, Watch
from megamoe.model.decoder import Decoder

# Ranks are threads here, which SystemExit ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


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


def test_a_step_is_followed_through_the_layers_forward_and_back_and_where_it_is_recomputed():
    assert "step 7, forward of layer 0" in places(recompute_blocks=1)[4:]
    assert places() == [
        "step 7, reading data",
        "step 7, forward of layer 0",
        "step 7, forward of layer 1",
        "step 7, backward of layer 1",
        "step 7, backward of layer 0",
    ]


def clocked(monkeypatch, *checks):
    """What a StallTimer returns at (seconds, value) pairs of a clock."""
    now = iter([0.0, *(seconds for seconds, _ in checks)])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    timer = StallTimer()
    return [timer.seconds(value) for _, value in checks]


def test_a_stall_is_the_time_since_a_value_changed_but_for_that_in_which_the_process_was_suspended(monkeypatch):
    assert clocked(monkeypatch, (1, "a"), (2, "a"), (4, "a"), (5, "b"), (6, "b")) == [0, 1, 3, 0, 1]
    longest = MAX_SECONDS_BETWEEN_CHECKS
    assert clocked(monkeypatch, (1, "a"), (2, "a"), (9000, "a"), (9001, "a")) == [0, 1, 1 + longest, 2 + longest]


@pytest.mark.parametrize("alone", [False, True])
def test_ranks_that_wait_for_rank_0_alone_are_no_stall(alone, monkeypatch):
    position, exits, now = Position(), [], iter(range(0, 99, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    watching = SimpleNamespace(
        collective_seconds=5, position=position, _exit=exits.append, _positions=lambda heartbeats: "there"
    )
    position.at("reading data", 3)
    position.at("evaluation of a task", alone=alone)
    progress = StallTimer()
    for _ in range(4):
        Watch._check_progress(watching, {0: "9 3 step 3", 1: "9 3 step 3"}, progress)
    assert bool(exits) is not alone
    position.at("forward of layer 0")
    Watch._check_progress(watching, {0: "9 3 step 3", 1: "9 3 step 3"}, progress)
    assert exits[-1] == "no rank has made progress for 5 s: there"


class Ranks:
    """A job of which some ranks watch each other, as threads; the others have sent one heartbeat and no more."""

    def __init__(self, world_size, watching, intervals):
        store = HashStore()
        self.stores = {rank: CountedStore("", store) for rank in range(world_size)}
        for rank in set(self.stores) - set(watching):
            self.stores[rank].set(f"heartbeat/{rank}", "1 0 step 4, forward of layer 2")
        self.exits, self._exited = {}, threading.Barrier(len(watching) + 1)
        hosts = [f"h{rank // 8}" for rank in range(world_size)]
        self.watches = {
            rank: Watch(
                Rendezvous(RankInfo(rank, world_size, 0, 1, "", 0, "none"), hosts, {}, self.stores[rank]),
                Position(), self.leave_with(rank), intervals,
            )
            for rank in watching
        }  # fmt: skip

    def leave_with(self, rank):
        def leave(code):
            self.watches[rank]._closing.set()
            if rank not in self.exits:
                self.exits[rank] = code
                self._exited.wait(DEADLINE)
            sys.exit()  # ends a thread

        return leave

    def fail(self, rank, error):
        """The rank's collective fails; returns the exit codes once all have exited."""
        threading.Thread(target=self.watches[rank].fail, args=(error,), daemon=True).start()
        self._exited.wait(DEADLINE)
        return self.exits


@pytest.mark.parametrize("world_size", [8, 64])
def test_after_a_failed_collective_rank_0_names_the_dead_and_no_other_rank_reads_all_heartbeats(world_size, capsys):
    ranks = Ranks(world_size, range(world_size - 2), Intervals(heartbeat=0.05, dead=1, launcher=0, read=DEADLINE))
    assert ranks.fail(3, RuntimeError("closed by peer")) == dict.fromkeys(range(world_size - 2), LOST)
    said = capsys.readouterr().err
    assert said == (
        f"error: ranks {world_size - 2}, {world_size - 1} on h{world_size // 8 - 1} died, last heard of in step 4, "
        "forward of layer 2; resume from the last checkpoint with --resume.\n"
    )
    assert all("multi_get" not in ranks.stores[rank].requests for rank in range(1, world_size - 2))


@pytest.mark.parametrize("error", [KeyError("a bug"), torch.OutOfMemoryError("a bug"), torch.AcceleratorError("a bug")])
def test_the_trace_of_an_error_is_not_lost_with_rank_0(error, capsys):
    def lose(*_):
        raise DistError("connection reset")

    rendezvous = Rendezvous(RankInfo(1, 2, 1, 2, "h1", 1, "none"), ["h1", "h1"], {}, HashStore())
    one = Watch(rendezvous, Position(), sys.exit, Intervals(heartbeat=600))  # the threads do nothing
    one._store = SimpleNamespace(compare_set=lose)
    with pytest.raises(SystemExit) as ended:
        one.fail(error)
    assert ended.value.code == LOST
    said = capsys.readouterr().err
    assert 0 <= said.index("a bug") < said.index("error: rank 0 on h1, or its launcher, died or cannot be reached")


@pytest.mark.parametrize(("of_host", "tellers"), [(1, [1]), (2, [1, 2])])
def test_the_loss_of_rank_0_is_printed_on_each_host_and_told_by_two_ranks_at_most(of_host, tellers, capsys):
    hosts, told = [f"h{rank // of_host}" for rank in range(5 * of_host)], []
    for rank in range(1, len(hosts)):
        lost = SimpleNamespace(rendezvous=SimpleNamespace(hosts=hosts), _rank=rank, _leave=lambda code: None)
        lost.on_failure = lambda message, code, dead, rank=rank: told.append(rank)
        Watch._exit_without_store(lost)
    assert told == tellers
    assert capsys.readouterr().err.count("rank 0 on h0") == len(set(hosts[1:]))
