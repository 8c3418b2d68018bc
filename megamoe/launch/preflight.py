"""What must hold on every host before ranks are started there: one sentence with the host and the remedy for each lack.

Each host makes a report of itself, as JSON; the host that launches collects and compares them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError, Store

from megamoe.config import RunConfig
from megamoe.data.token_files import corpus_prefix
from megamoe.errors import UserError
from megamoe.launch.rendezvous import (
    address_towards,
    await_keys,
    first_line,
    free_port,
    open_store,
    version_problems,
    versions,
)

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
ANSWER_SECONDS = 120  # a cold file system takes a while to load torch


@dataclass(frozen=True)
class Report:
    """What a host says of itself."""

    host: str
    started: str  # the line it was started with
    node: int  # place among the nodes of a Slurm job
    versions: dict[str, str]
    gpus: int
    absent: list[str]  # files that it does not see
    shares_run_folder: bool
    peer: str  # another host
    address: str | None  # of this one on the way to that; None where there is no way
    port: int  # that is free
    port_in_use: bool  # the one that was asked for


@dataclass(frozen=True)
class Endpoint:
    """Where hosts meet that each start by themselves."""

    host: str
    port: int
    least: int  # hosts
    most: int
    ranks: int  # of each host
    seconds: float  # to wait for them


def needed_files(run: RunConfig) -> list[Path]:
    """Files that every host must see."""
    prefixes = [corpus_prefix(source.path, "train") for source in run.data]
    if run.valid_data:
        prefixes.append(corpus_prefix(run.valid_data, "valid"))
    files = [Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx")]
    presets = [Path(run.preset)] if run.preset.endswith(".json") else []
    return [Path(run.ds_config), *presets, *files, *([Path(run.init_from)] if run.init_from else [])]


def report(run: RunConfig, started: str, peer: str, marker: Path | None, port: int | None) -> Report:
    """Of this host.

    Args:
        started: the line that it was started with.
        peer: another host of the job.
        marker: a file that the launching host has made beside the run folder.
        port: to be used here; None takes a free one.
    """
    return Report(
        host=socket.gethostname(),
        started=started,
        node=int(os.environ.get("SLURM_NODEID", 0)),
        versions=versions(),
        gpus=torch.cuda.device_count(),
        absent=[str(path) for path in needed_files(run) if not path.exists()],
        shares_run_folder=marker is None or marker.exists(),
        peer=peer,
        address=address_towards(peer),
        port=free_port() if port is None else port,
        port_in_use=port is not None and not _is_free(port),
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port just left is free
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def problems(reports: list[Report], run: RunConfig, ranks: dict[str, int]) -> list[str]:
    """What keeps a job from starting on the hosts of `reports`, of which the first is rank 0's.

    Args:
        ranks: how many each host runs; where that is not said, it is not checked.
    """
    first = reports[0]
    found = version_problems({one.host: one.versions for one in reports})
    found += [
        f"{one.host} was started with {one.started!r}, but {first.host} with {first.started!r}; start both alike."
        for one in reports
        if one.started != first.started
    ]
    for one in reports:
        found += [
            f"{one.host} does not see {path}; put it on a file system that all hosts share." for path in one.absent
        ]
        if not one.shares_run_folder:
            found.append(
                f"{one.host} does not see the files that {reports[0].host} writes beside the run folder {run.folder}; "
                "choose a --run_dir on a file system that all hosts share."
            )
        wanted = ranks.get(one.host, 0)
        if wanted > one.gpus and any(other.gpus for other in reports):
            found.append(f"{one.host} has {one.gpus} GPUs for {wanted} ranks; lower the ranks on it.")
    if first.port_in_use:
        found.append(f"port {first.port} is in use on {first.host}; set MASTER_PORT to a free one, or leave it out.")
    if len(reports) > 1 and first.address is None:
        found.append(f"{first.host} finds no way to {first.peer}; see that it can resolve and reach that name.")
    return found


# --- asking the hosts -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def marker_beside(folder: Path) -> Iterator[Path]:
    """A file in the deepest folder above `folder` that is there, for as long as hosts are asked whether they see it."""
    above = next(parent for parent in [folder, *folder.absolute().parents] if parent.is_dir())
    with tempfile.NamedTemporaryFile(dir=above, prefix=".preflight-") as marker:
        yield Path(marker.name).absolute()


def ask_by_ssh(hosts: list[str], command: list[str]) -> tuple[dict[str, Report], list[str]]:
    """Run `command`, which prints a report, in this folder on each host. Returns reports by host, and a sentence for
    each host that gives none."""

    def ask(host: str) -> Report:
        line = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
        return _answer(host, [*SSH, host, line])

    reports, silent = {}, []
    with ThreadPoolExecutor(32) as pool:
        for host, answer in [(host, pool.submit(ask, host)) for host in hosts]:
            try:
                reports[host] = answer.result()
            except UserError as error:
                silent += error.problems
    return reports, silent


def ask_by_srun(nodes: int, command: list[str]) -> list[Report]:
    """Run `command` once on each node of this Slurm job. Raises UserError where one gives no report."""
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    said = _run("the Slurm job's nodes", [*srun, *command])
    reports = [Report(**json.loads(line)) for line in said.splitlines() if line.startswith("{")]
    if len(reports) != nodes:
        raise UserError(
            f"{len(reports)} of {nodes} nodes have answered ({', '.join(one.host for one in reports)}); see by sinfo "
            "what state the others are in."
        )
    return reports


@dataclass(frozen=True)
class Agreement:
    """What hosts that have met agree on: where torchrun's agents meet, and this host's part."""

    address: str
    port: int
    own_address: str
    keeps: bool  # this host is the one


def meet(here: Callable[[Path], Report], run: RunConfig, at: Endpoint) -> Agreement:
    """Meet the other hosts, each of which calls this, and compare.

    Raises UserError on all of them for whatever is wrong with one.

    Args:
        here: makes this host's report, of a file that the endpoint's host has made beside the run folder.
    """
    try:
        return _meet(here, run, at)
    except DistError as error:
        raise UserError(
            f"{socket.gethostname()} has lost {at.host}:{at.port} while the hosts met ({first_line(error)}); see what "
            "the script says there."
        ) from None


def _meet(here: Callable[[Path], Report], run: RunConfig, at: Endpoint) -> Agreement:
    until = time.monotonic() + at.seconds
    keeps = _is_here(at.host, until)
    with contextlib.ExitStack() as stack:
        try:
            store = open_store(at.host, at.port, keeps, at.seconds)
        except DistError:
            why = "its port is in use" if keeps else f"it cannot be reached from here within {at.seconds:g} s"
            raise UserError(
                f"{socket.gethostname()} finds nobody to meet at {at.host}:{at.port}: {why}; start the same line on "
                "every host, with an ENDPOINT that is free and that all can reach."
            ) from None
        if keeps:
            store.set("marker", str(stack.enter_context(marker_beside(run.folder))))
        marker = Path(store.get("marker").decode())
        place = store.add("arrived", 1)
        store.set(f"report/{place}", as_line(here(marker)))
        if keeps:
            reports = _gather(store, at, until)
            found = problems(reports, run, {one.host: at.ranks for one in reports})
            if len(reports) < at.least:
                names = ", ".join(one.host for one in reports)
                found.append(
                    f"{len(reports)} of {at.least} hosts have come to {at.host}:{at.port} within {at.seconds:g} s "
                    f"({names}); start the same line on the others."
                )
            # The name of this host can mean its loopback to itself; the way to another one does not.
            others = [one.address for one in reports[1:] if one.address]
            address = (address_towards(others[0]) if others else None) or at.host
            store.set("answer", json.dumps({"problems": found, "address": address, "port": free_port()}))
            await_keys([f"heard/{place}" for place in range(2, len(reports) + 1)], store, time.monotonic() + 5)
        else:
            store.wait(["answer"], timedelta(seconds=at.seconds + ANSWER_SECONDS))
        answer = json.loads(store.get("answer"))
        store.set(f"heard/{place}", "")
    if answer["problems"]:
        raise UserError(*answer["problems"])
    own = None if keeps else address_towards(at.host)
    return Agreement(answer["address"], answer["port"], own or answer["address"], keeps)


def _is_here(host: str, until: float) -> bool:
    """Whether a host is this one. Its name may come to be known a little later: so it is in Kubernetes."""
    while host.split(".")[0] != socket.gethostname().split(".")[0]:
        try:
            return is_own(socket.gethostbyname(host))
        except OSError:
            if time.monotonic() > until:
                raise UserError(
                    f"{socket.gethostname()} cannot resolve {host}, where the hosts meet; mend that name."
                ) from None
            time.sleep(1)
    return True


def _gather(store: Store, at: Endpoint, until: float) -> list[Report]:
    """The reports of the hosts that come, this one's first; waits for all that may, as long as there is time."""
    await_keys([f"report/{place}" for place in range(1, at.most + 1)], store, until)
    came = [place for place in range(1, at.most + 1) if store.check([f"report/{place}"])]
    reports = [Report(**json.loads(store.get(f"report/{place}"))) for place in came]
    return sorted(reports, key=lambda one: one.host != socket.gethostname())


def is_own(address: str) -> bool:
    """Whether this host has the address: only then can a socket be bound to it."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _answer(host: str, command: list[str]) -> Report:
    lines = [line for line in _run(host, command).splitlines() if line.startswith("{")]
    if not lines:
        raise UserError(f"{host} answers without a report; see what `ssh {host} true` prints.")
    return Report(**json.loads(lines[-1]))


def _run(host: str, command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f"{host} does not answer within {ANSWER_SECONDS} s; see whether it hangs.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        if done.returncode == 255 and command[0] == "ssh":
            raise UserError(f"{host} does not answer by ssh ({last}); see that it is up and lets this host in by key.")
        raise UserError(f"{host} cannot check itself ({last}); install megamoe there at the same path.")
    return done.stdout


def as_line(one: Report) -> str:
    """A report as a line of JSON."""
    return json.dumps(asdict(one))
