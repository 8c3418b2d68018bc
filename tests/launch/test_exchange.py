"""The exchange of records through a store: each posts a record, and all get the server's answer."""

import threading
import time
from datetime import timedelta

import pytest
from ranks import DEADLINE

from megamoe.launch.exchange import ask, forget, open_store, post, receive, serve
from megamoe.launch.network import free_port


@pytest.fixture
def stores():
    """The server's store and a client's."""
    port = free_port()
    server = open_store("127.0.0.1", port, True, DEADLINE)
    return server, open_store("127.0.0.1", port, False, DEADLINE)


def in_thread(function, *args):
    """Start `function(*args)`; returns the thread and a list that gets what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
    thread.start()
    return thread, results


def test_every_participant_gets_the_servers_answer_to_all_records_in_order(stores):
    server, client = stores
    thread, results = in_thread(ask, client, 7, {"name": "b"}, DEADLINE)
    given = serve(server, 3, {"name": "a"}, [3, 7], lambda records: list(records.items()))
    thread.join()
    assert given == [(3, {"name": "a"}), (7, {"name": "b"})]
    assert results == [[[3, {"name": "a"}], [7, {"name": "b"}]]]  # as JSON returns it


def test_after_the_deadline_the_server_answers_those_that_have_come(stores):
    server, client = stores
    thread, results = in_thread(ask, client, 2, "second", DEADLINE)
    server.wait(["record/2"], timedelta(seconds=DEADLINE))  # a client does one call at a time
    assert serve(server, 0, "first", range(4), sorted, time.monotonic()) == [0, 2]
    thread.join()
    assert results == [[0, 2]]


def test_the_server_does_not_return_before_its_answer_was_read(stores):
    server, client = stores
    post(client, "record/1", "second")
    thread, results = in_thread(serve, server, 0, "first", range(2), len)
    client.wait(["answer"], timedelta(seconds=DEADLINE))
    assert thread.is_alive()  # though all have come
    assert ask(client, 1, "second", DEADLINE) == 2
    thread.join()
    assert results == [2]


def test_values_of_any_size_come_whole_and_nothing_is_left_of_an_exchange_that_is_forgotten(stores):
    server, client = stores
    large = {"slices": ["é" * 1000] * 6_000, "n": 1}  # above the 8 MiB at which the store breaks the connection
    post(server, "plan", large)
    thread, results = in_thread(ask, client, 1, large)
    assert serve(server, 0, None, range(2), lambda records: records[1], exits=lambda given: False) == large
    thread.join()
    assert results == [large] == [receive(client, "plan")]
    forget(server, range(2), "plan")
    assert server.num_keys() == 0
