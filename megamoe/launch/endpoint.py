"""The rendezvous of hosts that each start by themselves: they join at one endpoint and compare their reports."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import DistError, Store

from megamoe.config.run import RunConfig
from megamoe.launch.exchange import ask, open_store, serve
from megamoe.launch.network import address_towards, free_port, is_own
from megamoe.launch.preflight import Report, marker_next_to, problems
from megamoe.launch.rendezvous import raise_on
from megamoe.utils.errors import PeerError, UserError, first_line

ANSWER_SECONDS = 120  # the endpoint's host may have started later than this one, and so waits longer


@dataclass(frozen=True)
class Endpoint:
    """Where hosts join, and how many."""

    host: str
    port: int
    min_hosts: int
    max_hosts: int
    ranks: int  # of each host
    seconds: float  # to wait for the hosts

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class TorchrunSettings:
    """What torchrun is to be given on this host."""

    address: str  # where torchrun's agents join
    port: int
    local_address: str  # of this host
    is_host: bool  # the agents join on this host


def join(here: Callable[[Path], Report], run: RunConfig, at: Endpoint) -> TorchrunSettings:
    """Join the other hosts, each of which calls this, and compare all reports.

    Raises UserError on all of them for whatever is wrong with one; PeerError where hosts are only late, lost or out of
    reach.

    Args:
        here: makes this host's report, given a file that the endpoint's host has made next to the run folder.
    """
    try:
        return _join(here, run, at)
    except DistError as error:
        raise PeerError(
            f"{socket.gethostname()} has lost {at} during the rendezvous ({first_line(error)}); see the script's "
            "output there."
        ) from None


def _join(here: Callable[[Path], Report], run: RunConfig, at: Endpoint) -> TorchrunSettings:
    deadline = time.monotonic() + at.seconds
    is_host = _is_here(at.host, deadline)
    store = _open_store(at, is_host)
    with contextlib.ExitStack() as stack:
        if is_host:  # takes the first number before another host can
            store.add("joined", 1)
            store.set("marker", str(stack.enter_context(marker_next_to(run.folder))))
        marker = Path(store.get("marker").decode())
        number = 1 if is_host else store.add("joined", 1)
        report = asdict(here(marker))
        if is_host:
            expected = range(1, at.max_hosts + 1)
            answer = serve(store, number, report, expected, lambda records: _check(records, number, run, at), deadline)
        else:
            answer = ask(store, number, report, at.seconds + ANSWER_SECONDS)
    raise_on(answer)
    local = None if is_host else address_towards(at.host)
    return TorchrunSettings(answer["address"], answer["port"], local or answer["address"], is_host)


def _is_here(host: str, deadline: float) -> bool:
    """Whether a host is this one. Its name may become known a little later, as in Kubernetes."""
    while host.split(".")[0] != socket.gethostname().split(".")[0]:
        try:
            return is_own(socket.gethostbyname(host))
        except OSError:
            if time.monotonic() > deadline:
                raise PeerError(
                    f"{socket.gethostname()} cannot resolve {host}, the host of ENDPOINT; see that the name is right "
                    "and that its name server answers."
                ) from None
            time.sleep(1)
    return True


def _open_store(at: Endpoint, is_host: bool) -> Store:
    try:
        return open_store(at.host, at.port, is_host, at.seconds)
    except DistError as error:
        in_use = "EADDRINUSE" in str(error)
        why = "its port is in use" if in_use else f"it cannot be reached from here within {at.seconds:g} s"
        raise (UserError if in_use else PeerError)(
            f"{socket.gethostname()} cannot join at {at}: {why}; start the same line on every host, with an ENDPOINT "
            "that is free and that all can reach."
        ) from None


def _check(records: dict[int, Any], own: int, run: RunConfig, at: Endpoint) -> dict[str, Any]:
    """The endpoint's host's answer to the reports that have come."""
    reports = [Report(**records[number]) for number in sorted(records, key=lambda number: number != own)]
    reports[0] = replace(reports[0], address=at.host)  # its own name may become known later than to the others
    found = problems(reports, run, {one.host: at.ranks for one in reports})
    late = []
    if len(reports) < at.min_hosts:
        names = ", ".join(one.host for one in reports)
        late.append(
            f"{len(reports)} of {at.min_hosts} hosts have joined at {at} within {at.seconds:g} s ({names}); start the "
            "same line on the others."
        )
    # This host's own name can resolve to its loopback; the route to another host does not.
    others = [one.address for one in reports[1:] if one.address]
    address = (address_towards(others[0]) if others else None) or at.host
    return {"late": late, "problems": found, "address": address, "port": free_port()}
