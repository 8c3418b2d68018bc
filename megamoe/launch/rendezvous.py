"""The rendezvous of the ranks: each posts who it is to a store that all share, before anything else.

So a rank that is missing, that came twice or that has other versions is named, where torch would wait for half an hour.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch.distributed import PrefixStore, Store

from megamoe.launch.exchange import ask, joining, read_records, serve
from megamoe.launch.holders import pid_space
from megamoe.launch.rank_info import RankInfo
from megamoe.launch.versions import version_problems, versions
from megamoe.utils.errors import PeerError, UserError

JOIN_SECONDS = 300  # to wait for the other ranks; a cold file system takes minutes to load torch
ANSWER_SECONDS = 30  # rank 0 may have started later than this rank, and so waits longer


@dataclass(frozen=True)
class Member:
    """What a rank posts about itself when it joins."""

    host: str
    pid: int
    pid_space: str
    versions: dict[str, str]
    device: str | None  # what tells its GPU from any other; None on CPU


@dataclass(frozen=True)
class Rendezvous:
    """The ranks that have joined, and the store that they share."""

    rank_info: RankInfo
    hosts: list[str]  # by rank
    neighbors: dict[int, int]  # process ids, by rank, of the other ranks whose processes can be seen from here
    store: Store | None  # None for a single rank


def join(rank_info: RankInfo, seconds: float = JOIN_SECONDS, device: str | None = None) -> Rendezvous:
    """Wait for all ranks, and check that each came once, has rank 0's versions, and a GPU of its own.

    Args:
        device: unique to this rank's GPU; None on CPU.

    Raises UserError on every rank if not, or PeerError if ranks are only late or lost. Only rank 0's error has the
    sentences for what it has found, which are the same for all.
    """
    here = Member(socket.gethostname(), os.getpid(), pid_space(), versions(), device)
    if rank_info.world_size == 1:
        return Rendezvous(rank_info, [here.host], {}, None)
    deadline = time.monotonic() + seconds
    has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = rank_info.rank == 0 and not has_agent_store
    if is_server:  # two connections for each rank, ours and torch's
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # torchrun's agent keeps one store through all its restarts.
    start = os.environ["TORCHELASTIC_RESTART_COUNT"] if has_agent_store else "0"
    who = f"rank {rank_info.rank} on {here.host}"
    with joining(who, rank_info.address, rank_info.port, is_server, seconds) as store:
        return _join(rank_info, here, PrefixStore(f"megamoe/{start}", store), seconds, deadline)


def _join(rank_info: RankInfo, here: Member, store: Store, seconds: float, deadline: float) -> Rendezvous:
    rank = rank_info.rank
    if store.add(f"taken/{rank}", 1) > 1:
        raise UserError(
            f"rank {rank} on {here.host} is not the first rank {rank} to join at {rank_info.address}:{rank_info.port}; "
            "give every host its own --node_rank, and every job its own port."
        )
    if rank == 0:
        ranks = range(rank_info.world_size)
        answer = serve(
            store, rank, asdict(here), ranks, lambda records: _check(rank_info, records), deadline,
            exits=lambda given: bool(given["late"] or given["problems"]),
        )  # fmt: skip
    else:
        answer = ask(store, rank, asdict(here), seconds + ANSWER_SECONDS)
    raise_on(answer, says_why=rank == 0)
    # What all are told has a few bytes per host; of processes, a rank reads those on its own host.
    hosts = [host for host, ranks in answer["hosts"] for _ in range(ranks)]
    same_host = [other for other, host in enumerate(hosts) if host == here.host and other != rank]
    neighbors = {
        other: record["pid"]
        for other, record in read_records(store, same_host).items()
        if record["pid_space"] == here.pid_space
    }
    return Rendezvous(rank_info, hosts, neighbors, store)


def raise_on(answer: dict[str, Any], says_why: bool = True) -> None:
    """Raise UserError for the `problems` in an answer and who is `late`, or PeerError where that is all.

    Args:
        says_why: whether the error has the sentences.
    """
    sentences = answer["late"] + answer["problems"]
    if sentences:
        raise (UserError if answer["problems"] else PeerError)(*(sentences if says_why else []))


def _check(rank_info: RankInfo, records: dict[int, Any]) -> dict[str, Any]:
    """Rank 0's answer to the members that have joined, by rank."""
    members = [Member(**record) for record in records.values()]
    late = []
    missing = [rank for rank in range(rank_info.world_size) if rank not in records]
    if missing:
        names = dict.fromkeys(member.host for member in members)
        late.append(
            f"{len(members)} of {rank_info.world_size} ranks have joined at {rank_info.address}:{rank_info.port} in "
            f"time, from {', '.join(names)}; rank {', '.join(map(str, missing))} did not: see what their launcher "
            "prints on the other hosts."
        )
    by_host = {member.host: member.versions for member in reversed(members)}
    problems = version_problems({member.host: by_host[member.host] for member in members})
    problems += _device_problems(members)
    hosts = [(host, len(list(ranks))) for host, ranks in groupby(member.host for member in members)]
    return {"hosts": hosts, "late": late, "problems": problems}


def _device_problems(members: list[Member]) -> list[str]:
    """One sentence for each host with fewer GPUs than ranks, if any has some: NCCL refuses two ranks on one."""
    if not any(member.device for member in members):
        return []
    devices: dict[str, list[str | None]] = {}
    for member in members:
        devices.setdefault(member.host, []).append(member.device)
    return [
        f"{len(used)} ranks on {host} have {len(distinct)} GPU{'' if len(distinct) == 1 else 's'} between them, and "
        "NCCL takes one rank per GPU; start no more there than that, or let each rank see one of its own."
        for host, used in devices.items()
        if len(distinct := set(used) - {None}) < len(used)
    ]
