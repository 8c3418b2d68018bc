"""Where the ranks meet: from what a launcher puts into the environment to a store that all of them share.

DeepSpeed's launcher and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Slurm's srun has names
of its own. The ranks tell each other who they are before anything else, so that one that is missing, that came twice or
that has other versions is named, where torch would wait for half an hour.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import psutil
from torch.distributed import DistError, PrefixStore, Store, TCPStore

import megamoe
from megamoe.errors import UserError

JOIN_SECONDS = 300  # to wait for the other ranks; a cold file system takes minutes to load torch
PACKAGES = ("torch", "deepspeed")


@dataclass(frozen=True)
class Seat:
    """This rank's place among the ranks, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int  # ranks on this host
    address: str  # of rank 0's host
    port: int
    launcher: str  # "torch" (DeepSpeed's launcher or torchrun), "slurm", or "none"

    def environment(self) -> dict[str, str]:
        """The seat in the variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Member:
    """What a rank says of itself when it joins."""

    host: str
    pid: int
    pid_space: str  # a pid means something to those with the same one only
    versions: dict[str, str]


@dataclass(frozen=True)
class Meeting:
    """The ranks that have joined, by rank, and the store that they share; None for a rank alone."""

    seat: Seat
    members: list[Member]
    store: Store | None


# --- the seat -------------------------------------------------------------------------------------------------------


def find_seat(environment: Mapping[str, str]) -> Seat:
    """The seat that the launcher has given, or that of a rank alone on a free port. Raises UserError."""
    if "RANK" in environment:
        return _torch_seat(environment)
    # Of a step: in a batch script itself Slurm sets SLURM_PROCID and SLURM_NTASKS too.
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm_seat(environment)
    return Seat(0, 1, 0, 1, "127.0.0.1", free_port(), "none")


def free_port() -> int:
    """A TCP port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _torch_seat(environment: Mapping[str, str]) -> Seat:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"RANK is {environment['RANK']}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "set; start megamoe by deepspeed, torchrun or srun, or unset RANK."
        )
    return Seat(
        int(environment["RANK"]),
        int(environment["WORLD_SIZE"]),
        int(environment.get("LOCAL_RANK", 0)),
        int(environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", 1))),
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        "torch",
    )


def _slurm_seat(environment: Mapping[str, str]) -> Seat:
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    return Seat(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_LOCALID"]),
        tasks[int(environment["SLURM_NODEID"])],
        environment.get("MASTER_ADDR") or hosts_of(environment["SLURM_STEP_NODELIST"])[0],
        # Any port would do that all ranks compute alike and no other job or step on the host does.
        int(environment.get("MASTER_PORT") or slurm_port(environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"])),
        "slurm",
    )


def tasks_per_node(words: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", words):
        counts += [int(count)] * int(times or 1)
    return counts


def hosts_of(nodes: str) -> list[str]:
    """The hosts of Slurm's "h[1-2,5]", as scontrol spells them out. Raises UserError where that cannot be run."""
    try:
        said = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"Slurm's hosts {nodes} cannot be spelled out ({error}); set MASTER_ADDR to the first."
        ) from None
    return said.stdout.split()


def slurm_port(job: str, step: str) -> int:
    """A port of a Slurm job's step, below those that systems give out by themselves."""
    return 15_000 + (8 * int(job) + int(step)) % 15_000


# --- meeting --------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What must be the same on every host."""
    return {
        "megamoe": f"{megamoe.__version__} (source {_source_digest()})",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _source_digest() -> str:
    """Of megamoe's own modules: two checkouts of one version can differ."""
    digest = hashlib.sha256()
    for path in sorted(Path(megamoe.__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def version_problems(hosts: dict[str, dict[str, str]]) -> list[str]:
    """One sentence for each package that a host has in another version than the first."""
    first, *others = hosts
    return [
        f"{host} has {package} {hosts[host].get(package)}, but {first} has {wanted}; install the same on every host."
        for host in others
        for package, wanted in hosts[first].items()
        if hosts[host].get(package) != wanted
    ]


def meet(seat: Seat, seconds: float = JOIN_SECONDS) -> Meeting:
    """Wait for all ranks, and see that each came once and has rank 0's versions.

    Raises UserError on every rank if not; where rank 0 has said it, without a sentence.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    here = Member(socket.gethostname(), os.getpid(), f"{boot} {os.readlink('/proc/self/ns/pid')}", versions())
    if seat.world_size == 1:
        return Meeting(seat, [here], None)
    try:
        return _meet(seat, here, seconds)
    except DistError as error:
        raise UserError(
            f"rank {seat.rank} on {here.host} has lost rank 0 at {seat.address}:{seat.port} while the ranks met "
            f"({first_line(error)}); see what that one says."
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _meet(seat: Seat, here: Member, seconds: float) -> Meeting:
    until = time.monotonic() + seconds
    store = _join(seat, here.host, seconds)
    if store.add(f"taken/{seat.rank}", 1) > 1:
        raise UserError(
            f"rank {seat.rank} on {here.host} is not the first rank {seat.rank} to come to {seat.address}:{seat.port}; "
            "give every host its own --node_rank, and every job its own port."
        )
    store.set(f"member/{seat.rank}", json.dumps(asdict(here)))
    if seat.rank == 0:
        came, problems = _receive(seat, store, until)
        store.set("answer", json.dumps({"members": [asdict(member) for member in came.values()], "problems": problems}))
        if problems:  # the others must hear of it before the store goes with this process
            await_keys([f"heard/{rank}" for rank in came if rank], store, time.monotonic() + 5)
            raise UserError(*problems)
        members = list(came.values())
    else:
        store.wait(["answer"], timedelta(seconds=seconds + 30))
        answer = json.loads(store.get("answer"))
        store.set(f"heard/{seat.rank}", "")
        if answer["problems"]:
            raise UserError()
        members = [Member(**member) for member in answer["members"]]
    return Meeting(seat, members, store)


def _join(seat: Seat, host: str, seconds: float) -> Store:
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = seat.rank == 0 and not by_agent
    if keeps:  # two connections for each rank, ours and torch's
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # torchrun's agent keeps one store through all its restarts.
    start = os.environ["TORCHELASTIC_RESTART_COUNT"] if by_agent else "0"
    try:
        return PrefixStore(f"megamoe/{start}", open_store(seat.address, seat.port, keeps, seconds))
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {seat.port} is in use on {host}; set MASTER_PORT to a free one, or leave it out."
            ) from None
        raise UserError(
            f"rank {seat.rank} on {host} cannot reach rank 0 at {seat.address}:{seat.port} within {seconds:.0f} s; see "
            "that rank 0 has started there, and that name and firewall let this host through."
        ) from None


def open_store(address: str, port: int, is_master: bool, seconds: float) -> TCPStore:
    """torch's store at an address: kept by this process, or reached within so many seconds. Raises DistError."""
    return TCPStore(
        address,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,  # torch's own group will share the port
    )


def _receive(seat: Seat, store: Store, until: float) -> tuple[dict[int, Member], list[str]]:
    """On rank 0: the members that have come, by rank, and what is wrong with them."""
    missing = await_keys([f"member/{rank}" for rank in range(seat.world_size)], store, until)
    came = {
        rank: Member(**json.loads(store.get(f"member/{rank}")))
        for rank in range(seat.world_size)
        if f"member/{rank}" not in missing
    }
    members = list(came.values())
    problems = []
    if missing:
        hosts = dict.fromkeys(member.host for member in members)
        absent = ", ".join(key.removeprefix("member/") for key in missing)
        problems.append(
            f"{len(came)} of {seat.world_size} ranks have joined at {seat.address}:{seat.port} in time, from "
            f"{', '.join(hosts)}; rank {absent} did not: see what their launcher says on the other hosts."
        )
    by_host = {member.host: member.versions for member in reversed(members)}
    problems += version_problems({member.host: by_host[member.host] for member in members})
    return came, problems


def await_keys(keys: list[str], store: Store, until: float) -> list[str]:
    """Wait until all keys are set, or the clock of `time.monotonic` says `until`; returns those that are not."""
    while not store.check(keys):
        if time.monotonic() > until:
            return [key for key in keys if not store.check([key])]
        time.sleep(0.05)
    return []


# --- the network ----------------------------------------------------------------------------------------------------


def address_towards(host: str) -> str | None:
    """This host's own IPv4 address on the way to `host`; None where there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """Name of the network interface on the way to `host`; None where that is a loopback, or there is no way."""
    own = address_towards(host)
    if own is None or own.startswith("127."):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == own for one in addresses):
            return name
    return None
