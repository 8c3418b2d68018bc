"""The rendezvous of hosts that each start by themselves: they join at one endpoint and compare their reports."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megamoe.config.run import RunConfig
from megamoe.launch.exchange import ask, joining, serve
from megamoe.launch.network import address_towards, free_port, is_own
from megamoe.launch.preflight import Report, marker_next_to, print_warnings, problems
from megamoe.launch.rendezvous import raise_on

ANSWER_SECONDS = 120  # the endpoint's host may have started later than this one, and so waits longer


@dataclass(frozen=True)
class Endpoint:
    """Where hosts join, and how many."""

    host: str
    port: int
    min_hosts: int
    max_hosts: int
    seconds: float  # to wait for the hosts

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def join(here: Callable[[Path], Report], run: RunConfig, at: Endpoint) -> tuple[str, str, bool]:
    """Join the other hosts, each of which calls this, and compare all reports.

    Returns what torchrun is to be given on this host: HOST:PORT where its agents join, this host's address, and
    whether they join here. Raises UserError on all hosts for whatever is wrong with one; PeerError where hosts are only
    late, lost or out of reach.

    Args:
        here: makes this host's report, given a file that the endpoint's host has made next to the run folder.
    """
    deadline = time.monotonic() + at.seconds
    is_host = _is_here(at.host)
    with (
        joining(socket.gethostname(), at.host, at.port, is_host, at.seconds) as store,
        marker_next_to(run.folder) if is_host else contextlib.nullcontext() as made,
    ):
        if is_host:  # takes the first number before another host can
            store.add("joined", 1)
            store.set("marker", str(made))
        report = asdict(here(Path(store.get("marker").decode())))
        if is_host:
            answer = serve(
                store, 1, report, range(1, at.max_hosts + 1), lambda records: _check(records, run, at), deadline
            )
        else:
            answer = ask(store, store.add("joined", 1), report, at.seconds + ANSWER_SECONDS)
    raise_on(answer)
    local = None if is_host else address_towards(at.host)
    return f"{answer['address']}:{answer['port']}", local or answer["address"], is_host


def _is_here(host: str) -> bool:
    """Whether a host is this one. One whose name is not known yet, as in Kubernetes, is another."""
    try:
        same_name = host.split(".")[0] == socket.gethostname().split(".")[0]
        return same_name or is_own(socket.gethostbyname(host))
    except OSError:
        return False


def _check(records: dict[int, Any], run: RunConfig, at: Endpoint) -> dict[str, Any]:
    """The endpoint's host's answer to the reports that have come, of which its own is the first."""
    reports = [Report(**record) for record in records.values()]
    reports[0] = replace(reports[0], address=at.host)  # its own name may become known later than to the others
    print_warnings(reports)
    found = problems(reports, run)
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
