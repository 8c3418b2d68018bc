"""The rendezvous of ranks."""

import os
import re
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from benchmark_ranks import CountedStore
from ranks import DEADLINE

from megamoe.launch import rendezvous
from megamoe.launch.codes import FAILED, REFUSED
from megamoe.launch.exchange import open_store
from megamoe.launch.exits import code_of
from megamoe.launch.network import free_port
from megamoe.launch.rank_info import RankInfo
from megamoe.launch.rendezvous import join
from megamoe.utils.errors import UserError


def join_all(infos, seconds=float(DEADLINE), devices=None):
    """What each of the ranks gets, a Rendezvous or a UserError (a PeerError is one); each on a thread of its own."""
    answers = {}

    def one(place, info):
        try:
            answers[place] = join(info, seconds, devices[place] if devices else None)
        except UserError as error:
            answers[place] = error

    threads = [threading.Thread(target=one, args=pair, name=str(pair[0])) for pair in enumerate(infos)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[place] for place in range(len(infos))]


def infos(ranks, world_size, port=None):
    port = port or free_port()
    return [RankInfo(rank, world_size, rank, world_size, "127.0.0.1", port, "torch") for rank in ranks]


def pretend_hosts(monkeypatch, host_of):
    """Let `host_of` say on which host each rank is."""
    monkeypatch.setattr(socket, "gethostname", lambda: host_of(int(threading.current_thread().name)))


def test_ranks_share_a_store_and_know_the_host_of_each_and_the_processes_of_their_own(monkeypatch):
    pretend_hosts(monkeypatch, lambda rank: f"h{rank % 2}")
    ranks = infos(range(4), 4)
    pids = iter(range(100, 104))
    monkeypatch.setattr(rendezvous, "pid_space", lambda: "container" if threading.current_thread().name == "2" else "")
    monkeypatch.setattr(os, "getpid", lambda: next(pids))
    joined = join_all(ranks)
    assert [one.hosts for one in joined] == [["h0", "h1", "h0", "h1"]] * 4
    assert [sorted(one.neighbors) for one in joined] == [[], [3], [], [1]]  # rank 2 has process ids of its own
    assert len({*joined[1].neighbors.values(), *joined[3].neighbors.values()}) == 2
    joined[0].store.set("key", "value")
    assert joined[2].store.get("key") == b"value"


def test_requests_of_a_rank_do_not_grow_with_the_ranks_and_bytes_only_with_the_hosts(monkeypatch):
    monkeypatch.setattr(rendezvous, "PrefixStore", CountedStore)
    pretend_hosts(monkeypatch, lambda rank: f"h{rank // 8:03}")
    few, many = ([one.store for one in join_all(infos(range(ranks), ranks))] for ranks in (8, 64))
    assert {store.requests.total() for store in few[1:] + many[1:]} == {6}
    assert max(store.bytes for store in many[1:]) - max(store.bytes for store in few[1:]) < 7 * 20
    for store in (few[0], many[0]):
        del store.requests["check"]  # it looks again and again whether all have come
    assert few[0].requests == many[0].requests


@pytest.mark.parametrize("devices", [["GPU-1", "GPU-2", "GPU-1"], ["GPU-1", "GPU-2", None]])
def test_ranks_without_a_gpu_of_their_own_are_refused_and_others_are_not(devices):
    first, *others = join_all(infos([0, 1, 2], 3), devices=devices)
    (problem,) = first.problems
    assert f"3 ranks on {socket.gethostname()} have 2 GPUs between them" in problem
    assert "start no more there than that, or let each rank see one of its own" in problem
    assert [code_of(error) for error in (first, *others)] == [REFUSED] * 3
    joined = join_all(infos([0, 1], 2), devices=["GPU-1", "GPU-2"])
    assert [one.hosts for one in joined] == [[socket.gethostname()] * 2] * 2


def be_late(monkeypatch, *others):
    """Let rank 0's time be over as soon as these others have joined."""
    serve = rendezvous.serve

    def serve_late(store, rank, record, ranks, answer, deadline, **options):
        store.wait([f"record/{other}" for other in others], timedelta(seconds=DEADLINE))
        return serve(store, rank, record, ranks, answer, time.monotonic(), **options)

    monkeypatch.setattr(rendezvous, "serve", serve_late)


def test_ranks_that_do_not_join_are_named_once_and_all_exit(monkeypatch):
    be_late(monkeypatch, 2)
    first, other = join_all(infos([0, 2], 4))
    assert len(first.problems) == 1
    assert "2 of 4 ranks have joined" in first.problems[0]
    assert "rank 1, 3 did not" in first.problems[0]
    assert other.problems == []
    assert code_of(first) == code_of(other) == FAILED  # which a restart can cure


def test_a_rank_that_joins_twice_is_refused():
    port = free_port()
    first, *others = join_all([*infos([0, 1], 2, port), *infos([1], 2, port)])
    refused = [answer for answer in others if isinstance(answer, UserError)]
    assert len(refused) == 1
    assert "is not the first rank 1 to join" in refused[0].problems[0]
    assert len(first.hosts) == 2
    assert code_of(refused[0]) == REFUSED


@pytest.mark.parametrize("address", ["127.0.0.1", "rank-0.invalid"])
def test_a_rank_0_that_does_not_join_or_whose_name_is_unknown_is_for_a_restart_to_cure(address):
    (answer,) = join_all([replace(infos([1], 2)[0], address=address)], seconds=0.1)
    assert re.match(rf"rank 1 on .* cannot reach {address}:", answer.problems[0])
    assert code_of(answer) == FAILED


def test_a_rank_0_that_is_lost_during_the_rendezvous_is_for_a_restart_to_cure(monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0)
    (info,) = infos([1], 2)
    store = open_store(info.address, info.port, True, 240)  # which gives no answer
    (answer,) = join_all([info], seconds=5)
    assert "has lost 127.0.0.1:" in answer.problems[0]
    assert code_of(answer) == FAILED
    del store


def test_a_busy_port_is_named():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        (answer,) = join_all(infos([0], 2, port), seconds=5)
    assert answer.problems[0].startswith(f"port {port} of 127.0.0.1 is in use; give deepspeed a free --master_port,")
    assert code_of(answer) == REFUSED


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_with_other_versions_is_named_with_its_host_also_where_a_rank_is_late(late, monkeypatch):
    names, versions = iter(["h1", "h2"]), iter([{"torch": "2.13"}, {"torch": "2.12"}])
    monkeypatch.setattr(socket, "gethostname", lambda: next(names))
    monkeypatch.setattr(rendezvous, "versions", lambda: next(versions))
    if late:
        be_late(monkeypatch, 1)
    answers = join_all(infos([0, 1], 2 + late))
    assert [code_of(answer) for answer in answers] == [REFUSED, REFUSED]
    *others, problem = [problem for answer in answers for problem in answer.problems]
    assert len(others) == late
    named = r"h[12] has torch 2\.1[23], but h[12] has 2\.1[23]; install the same on every host\."
    assert re.fullmatch(named, problem)
