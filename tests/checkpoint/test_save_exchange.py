"""What ranks say about a save, through a store that they share."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megamoe.checkpoint.exchange import SaveExchange


@pytest.fixture
def exchanges():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
    return [SaveExchange(store, rank, 2) for rank, store in enumerate((server, client))], server


def take_part(exchange, save, part):
    plan = exchange.plan(save)
    exchange.post(save, part)
    return plan, exchange.outcome(save)


def test_a_part_of_any_size_comes_whole_and_what_was_said_is_forgotten(exchanges):
    (first, second), store = exchanges
    part = {"slices": ["é" * 1000] * 6_000, "n": 1}  # above the 8 MiB at which the store breaks the connection
    keys = []
    with ThreadPoolExecutor(1) as other:
        for save in range(1, 4):
            told = other.submit(take_part, second, save, part)
            first.begin(save, {"folder": save})
            first.post(save, {"own": save})
            assert first.gather(save) == [{"own": save}, part]
            first.conclude(save, None)
            assert told.result(20) == ({"folder": save}, None)
            keys.append(store.num_keys())
    assert keys[-1] == keys[1]  # no more with every save


def test_a_single_rank_needs_no_store():
    exchange = SaveExchange(None, 0, 1)
    exchange.begin(1, "plan")
    exchange.post(1, "part")
    assert exchange.plan(1) == "plan"
    assert exchange.gather(1) == ["part"]
    exchange.conclude(1, "failed")
    assert exchange.outcome(1) == "failed"


def test_a_second_writer_on_the_same_store_does_not_hear_the_first(exchanges):
    (first, second), store = exchanges
    first.begin(1, "an old plan")
    again = SaveExchange(store, 0, 2)
    again.begin(1, "a new plan")
    assert SaveExchange(second._store.underlying_store, 1, 2).plan(1) == "a new plan"
