"""One exchange of records through torch's TCPStore: each participant posts a record, and all get the server's answer.

The server gathers the records until all are there or its deadline passes, and makes an answer of them. The store ends
with the server's process, so a server that exits waits until the others have read it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore

READ_SECONDS = 5  # the server waits for the others to read its answer
POLL_SECONDS = 0.05


def open_store(address: str, port: int, is_server: bool, seconds: float) -> TCPStore:
    """Serve a store at this address, or connect to the one there within `seconds`. Raises DistError."""
    return TCPStore(
        address,
        port,
        is_master=is_server,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,  # torch's process group will share the port
    )


def serve(
    store: Store,
    participant: int,
    record: Any,
    expected: Iterable[int],
    deadline: float,
    answer: Callable[[dict[int, Any]], Any],
    exits: Callable[[Any], bool] = lambda given: True,
) -> Any:
    """Post `record` as the server, answer all participants, and return the answer. Raises DistError.

    Args:
        participant: number of this one.
        record: anything that JSON can hold; the answer, too.
        expected: numbers of all participants that may come.
        deadline: to gather records, on the clock of `time.monotonic`.
        answer: gives the answer to the records that have come, by participant in the order of `expected`.
        exits: whether the server exits after an answer, and with it the store; then it waits for the readers.
    """
    store.set(f"record/{participant}", json.dumps(record))
    keys = {f"record/{number}": number for number in expected}
    missing = set(wait_for_keys(list(keys), store, deadline))
    records = read_records(store, [number for key, number in keys.items() if key not in missing])
    given = answer(records)
    store.set("answer", json.dumps(given))
    if exits(given):
        readers = [f"read/{number}" for number in records if number != participant]
        wait_for_keys(readers, store, time.monotonic() + READ_SECONDS)
    return given


def ask(store: Store, participant: int, record: Any, seconds: float) -> Any:
    """Post `record` and return the server's answer. Raises DistError after `seconds`."""
    store.set(f"record/{participant}", json.dumps(record))
    store.wait(["answer"], timedelta(seconds=seconds))
    given = json.loads(store.get("answer"))
    store.set(f"read/{participant}", "")
    return given


def read_records(store: Store, participants: list[int]) -> dict[int, Any]:
    """The records that these participants have posted, in one request. Raises DistError."""
    values = store.multi_get([f"record/{number}" for number in participants])
    return {number: json.loads(value) for number, value in zip(participants, values, strict=True)}


def wait_for_keys(keys: list[str], store: Store, deadline: float) -> list[str]:
    """Wait until all keys are set or `time.monotonic` reaches the deadline; returns the keys that are not set."""
    while not store.check(keys):
        if time.monotonic() > deadline:
            return [key for key in keys if not store.check([key])]
        time.sleep(POLL_SECONDS)
    return []
