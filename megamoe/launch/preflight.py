"""What must hold on every host before ranks are started there: one sentence with the host and the remedy for each lack.

Each host makes a report on itself, as JSON; the host that launches collects and compares them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic.dataclasses import dataclass

from megamoe.config.phases import read_phases
from megamoe.config.run import RunConfig
from megamoe.data.source import is_remote
from megamoe.data.sources import OWN
from megamoe.data.token_files import corpus_prefix, files_of
from megamoe.launch.host_checks import Finding, host_findings
from megamoe.launch.network import address_towards, free_port, is_free
from megamoe.launch.versions import version_problems, versions
from megamoe.utils.disk import existing_folder


@dataclass(frozen=True)
class Report:
    """What a host reports on itself; `Report(**record)` reads one that was sent as JSON."""

    host: str
    started: str  # the line it was started with
    node: int  # index among the nodes of a Slurm job
    versions: dict[str, str]
    absent: list[str]  # files that it does not see
    shares_run_folder: bool
    peer: str  # another host
    address: str | None  # its own on the route to that; None without a route
    port: int  # that is free
    port_in_use: bool  # the one that was asked for
    findings: list[Finding]  # that are not ok


def needed_files(run: RunConfig) -> list[Path]:
    """Files that every host must see. Object stores and sources of the user's own are opened by the ranks."""
    file = run.data_schedule
    mixes = [phase.data or run.data for phase in read_phases(file)] if file and Path(file).exists() else [run.data]
    paths = dict.fromkeys(one.path for mix in mixes for one in mix)
    sources = [*((path, "train") for path in paths), *((one.path, "valid") for one in run.valid_data)]
    prefixes = [corpus_prefix(path, split) for path, split in sources if not (is_remote(path) or OWN.fullmatch(path))]
    files = [file for prefix in prefixes for file in files_of(prefix)]
    presets = [Path(run.preset)] if run.preset.endswith(".json") else []
    given = [Path(path) for path in (run.data_schedule, run.init_from) if path]
    return [Path(run.ds_config), *presets, *files, *given]


def report(run: RunConfig, started: str, peer: str, marker: Path | None, port: int | None) -> Report:
    """This host's report.

    Args:
        started: the line that it was started with.
        peer: another host of the job.
        marker: a file that the launching host has made next to the run folder.
        port: to be used here; None takes a free one.
    """
    return Report(
        host=socket.gethostname(),
        started=started,
        node=int(os.environ.get("SLURM_NODEID", 0)),
        versions=versions(),
        absent=[str(path) for path in needed_files(run) if not path.exists()],
        shares_run_folder=marker is None or marker.exists(),
        peer=peer,
        address=address_towards(peer),
        port=free_port() if port is None else port,
        port_in_use=port is not None and not is_free(port),
        findings=[one for one in host_findings(run.folder) if one.severity != "ok"],
    )


@contextlib.contextmanager
def marker_next_to(folder: Path) -> Iterator[Path]:
    """A file in the deepest existing folder above `folder`, for as long as hosts are asked whether they see it."""
    with tempfile.NamedTemporaryFile(dir=existing_folder(folder), prefix=".preflight-") as marker:
        yield Path(marker.name).absolute()


def problems(reports: list[Report], run: RunConfig) -> list[str]:
    """What keeps a job from starting on the hosts of `reports`, of which the first is rank 0's. GPUs are checked
    by the ranks when they join."""
    first = reports[0]
    found = version_problems({one.host: one.versions for one in reports})
    found += [
        f"{one.host} was started with {one.started!r}, but {first.host} with {first.started!r}; start both alike."
        for one in reports
        if one.started != first.started
    ]
    for one in reports:
        found += [f"{one.host}: {finding}" for finding in one.findings if finding.severity == "error"]
        found += [
            f"{one.host} does not see {path}; put it on a file system that all hosts share." for path in one.absent
        ]
        if not one.shares_run_folder:
            found.append(
                f"{one.host} does not see the files that {first.host} writes next to the run folder {run.folder}; "
                "choose a --run_dir on a file system that all hosts share."
            )
    if first.port_in_use:
        found.append(f"port {first.port} is in use on {first.host}; set MASTER_PORT to a free one, or leave it out.")
    if len(reports) > 1 and first.address is None:
        found.append(f"{first.host} has no route to {first.peer}; see that it can resolve and reach that name.")
    return found


def print_warnings(reports: Iterable[Report]) -> None:
    """Say what hosts warn of, each sentence once, with the hosts."""
    hosts: dict[str, list[str]] = {}
    for one in reports:
        for finding in one.findings:
            if finding.severity == "warning":
                hosts.setdefault(str(finding), []).append(one.host)
    for sentence, names in hosts.items():
        print(f"warning: {', '.join(names)}: {sentence}", file=sys.stderr, flush=True)
