"""Records through torch's TCPStore: each participant posts a record, and all get the server's answer.

The server gathers the records until all are there or its deadline passes, and makes an answer of them. The store ends
with the server's process, so a server that exits waits until the others have read it. Records, answers and other
values are what JSON can hold, of any size.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, Store, TCPStore

from megamoe.utils.errors import PeerError, UserError, first_line

READ_SECONDS = 5  # the server waits for the others to read its answer
PAUSE_SECONDS = 0.02  # between two looks into the store; longer with time
LONGEST_PAUSE_SECONDS = 0.5
PIECE_BYTES = 1 << 20  # the store breaks a connection over values of 8 MiB


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


@contextlib.contextmanager
def joining(who: str, address: str, port: int, is_server: bool, seconds: float) -> Iterator[TCPStore]:
    """A store at this address, to join others at. Raises UserError where the port is in use, PeerError where the server
    is out of reach or is lost."""
    try:
        store = open_store(address, port, is_server, seconds)
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} of {address} is in use; give deepspeed a free --master_port, and the launch scripts and "
                "torchrun a free MASTER_PORT or none, or another ENDPOINT."
            ) from None
        raise PeerError(
            f"{who} cannot reach {address}:{port} within {seconds:.0f} s; see that the same job has started there, and "
            "that name and firewall let this host through."
        ) from None
    try:
        yield store
    except DistError as error:
        raise PeerError(
            f"{who} has lost {address}:{port} during the rendezvous ({first_line(error)}); see the output there."
        ) from None


# --- records and an answer ------------------------------------------------------------------------------------------


def serve(
    store: Store,
    participant: int,
    record: Any,
    expected: Iterable[int],
    answer: Callable[[dict[int, Any]], Any],
    deadline: float = math.inf,
    exits: Callable[[Any], bool] = lambda given: True,
) -> Any:
    """Post `record` as the server, answer all participants, and return the answer. Raises DistError.

    Args:
        participant: number of this one.
        expected: numbers of all participants that may come.
        answer: gives the answer to the records that have come, by participant in the order of `expected`.
        deadline: to gather records, on the clock of `time.monotonic`.
        exits: whether the server exits after an answer, and with it the store; then it waits for the readers.
    """
    post(store, f"record/{participant}", record)
    keys = {f"record/{number}": number for number in expected}
    missing = set(wait_for_keys(list(keys), store, deadline))
    records = read_records(store, [number for key, number in keys.items() if key not in missing])
    given = answer(records)
    post(store, "answer", given)
    if exits(given):
        readers = [f"read/{number}" for number in records if number != participant]
        wait_for_keys(readers, store, time.monotonic() + READ_SECONDS)
    return given


def ask(store: Store, participant: int, record: Any, seconds: float | None = None) -> Any:
    """Post `record` and return the server's answer. Raises DistError. `seconds`: see `receive`."""
    post(store, f"record/{participant}", record)
    given = receive(store, "answer", seconds)
    post(store, f"read/{participant}", None)
    return given


def read_records(store: Store, participants: list[int]) -> dict[int, Any]:
    """The records that these participants have posted. Raises DistError."""
    keys = [f"record/{number}" for number in participants]
    return dict(zip(participants, _read(store, keys), strict=True))


# --- values ---------------------------------------------------------------------------------------------------------


def post(store: Store, key: str, value: Any) -> None:
    """Put a value into the store. Raises DistError."""
    first, *rest = _pieces(json.dumps(value))
    for number, piece in enumerate(rest):
        store.set(f"{key}/{number}", piece)
    store.set(key, f"{len(rest)} {first}")  # the last, for it says that all are there


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES)]


def receive(store: Store, key: str, seconds: float | None = None) -> Any:
    """Wait for a value, and return it. Raises DistError.

    Args:
        seconds: most to wait, in a single request: the other threads of this process cannot use the store meanwhile.
            None waits for as long as it takes, and looks again and again.
    """
    if seconds is None:
        wait_for_keys([key], store)
    else:
        store.wait([key], timedelta(seconds=seconds))
    return _read(store, [key])[0]


def _read(store: Store, keys: list[str]) -> list[Any]:
    """The values that are there, in one request but for large ones."""
    values = []
    for key, found in zip(keys, store.multi_get(keys), strict=True):
        count, _, first = found.decode().partition(" ")
        rest = [store.get(f"{key}/{number}").decode() for number in range(int(count))]
        values.append(json.loads("".join([first, *rest])))
    return values


def forget(store: Store, participants: Iterable[int], *keys: str) -> None:
    """Remove what an exchange between these participants has left in the store, and further values."""
    numbers = list(participants)
    for key in ("answer", *keys, *(f"{kind}/{number}" for kind in ("record", "read") for number in numbers)):
        if store.check([key]):
            for number in range(int(store.get(key).split(b" ")[0])):
                store.delete_key(f"{key}/{number}")
            store.delete_key(key)


def wait_for_keys(keys: list[str], store: Store, deadline: float = math.inf) -> list[str]:
    """Wait until all keys are set or `time.monotonic` reaches the deadline; returns the keys that are not set."""
    pause = PAUSE_SECONDS
    while not store.check(keys):
        if time.monotonic() > deadline:
            return [key for key in keys if not store.check([key])]
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
    return []
