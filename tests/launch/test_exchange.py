"""The exchange of records through a store: each posts a record, and all get the server's answer."""

import threading
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
