"""Check the hosts of a job before ranks are started on them; the launch scripts call it.

    python tools/preflight.py hostfile HOSTFILE -- --ds_config FILE [options of pretrain.py]
    python tools/preflight.py slurm -- ...          in a Slurm job
    python tools/preflight.py endpoint HOST:PORT --hosts 2 -- ...       on each host, before torchrun

Exits with one sentence for each problem and code 2; for endpoint 1, if hosts are only late or out of reach. Else the
last line printed holds, for the first two, the name, the address and a free port of rank 0's host, and the run folder;
for endpoint, the address and port where torchrun's agents join, this host's address, and whether they join here.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from megamoe.config.cli import Options, Positional
from megamoe.config.run import RunConfig, parse_run
from megamoe.launch.endpoint import Endpoint, join
from megamoe.launch.preflight import marker_next_to, print_warnings, problems, report
from megamoe.launch.rank_info import hosts_of
from megamoe.launch.remote import ask_by_srun, ask_by_ssh, in_lines
from megamoe.utils.errors import Problems, UserError


class Preflight(Options):
    launcher: Positional[Literal["hostfile", "slurm", "endpoint", "report"]] = Field(description="what is asked")
    words: Positional[list[str]] = Field(
        default=[], description="the hostfile, HOST:PORT where hosts join, or a host; then -- and the run's options"
    )
    port: int | None = Field(default=None, ge=1, le=65535, description="MASTER_PORT; by default a free one")
    min_hosts: int | None = Field(default=None, ge=1, description="continue if so many answer; by default all must")
    usable: Path | None = Field(default=None, description="hostfile to write, with the hosts that answer")
    hosts: str = Field(default="1", description="for endpoint: how many join, or MIN:MAX")
    ranks: int | None = Field(default=None, ge=1, description="for endpoint: ranks of each host")
    seconds: int = Field(default=300, ge=1, description="for endpoint: JOIN_TIMEOUT, how long to wait for the hosts")
    marker: Path | None = Field(default=None, description="for report: a file that this host should see")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host. Raises UserError."""
    from deepspeed.launcher.runner import fetch_hostfile

    if not path.is_file():
        raise UserError(f"hostfile {path} does not exist; give a file with a line 'HOST slots=RANKS' for each host.")
    try:
        slots = dict(fetch_hostfile(str(path)))
    except ValueError as error:
        why = str(error).rstrip(".")
        raise UserError(f"hostfile {path}: {why}; write a line 'HOST slots=RANKS' for each host.") from None
    idle = [host for host, count in slots.items() if count < 1]
    if idle:
        raise UserError(f"hostfile {path}: {', '.join(idle)} has no slots; give at least 1, or leave the host out.")
    return slots


def command_of_report(options: Preflight, peer: str, marker: Path, words: list[str]) -> list[str]:
    program = Path(sys.argv[0]).resolve()
    own = [str(program)] if program.name == "preflight.py" else ["-m", "megamoe", "preflight"]
    command = [sys.executable, *own, "report", peer, "--marker", str(marker)]
    return [*command, *(["--port", str(options.port)] if options.port else []), "--", *words]


def check_hostfile(options: Preflight, where: str, run: RunConfig, words: list[str]) -> None:
    slots = read_hostfile(Path(where))
    hosts = list(slots)
    with marker_next_to(run.folder) as marker:
        # The last host's route to itself does not matter: only the first host's counts.
        reports, silent = ask_by_ssh(hosts, command_of_report(options, hosts[-1], marker, words))
    if silent and len(reports) < (options.min_hosts or len(hosts)):
        raise UserError(*silent)
    for problem in silent:
        print(f"continuing without a host: {problem}", file=sys.stderr)
    if hosts[-1] not in reports:  # so no host can find a route to it
        reports = {host: replace(one, address=one.address or host) for host, one in reports.items()}
    print_warnings(reports.values())
    Problems(problems(list(reports.values()), run)).refuse()
    if options.usable:
        options.usable.write_text("".join(f"{host} slots={slots[host]}\n" for host in reports))
    first = next(iter(reports))
    print(first, reports[first].address or first, reports[first].port, run.folder)


def check_slurm(options: Preflight, _: str, run: RunConfig, words: list[str]) -> None:
    if "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError("this is not a Slurm job; start it by sbatch launch_scripts/slurm.sbatch.")
    hosts = hosts_of(os.environ["SLURM_JOB_NODELIST"])
    with marker_next_to(run.folder) as marker:
        reports = ask_by_srun(len(hosts), command_of_report(options, hosts[-1], marker, words))
    reports.sort(key=lambda one: one.node)
    print_warnings(reports)
    Problems(problems(reports, run)).refuse()
    print(reports[0].host, reports[0].address or hosts[0], reports[0].port, run.folder)


def check_endpoint(options: Preflight, where: str, run: RunConfig, words: list[str]) -> None:
    host, _, port = where.rpartition(":")
    least, _, most = options.hosts.partition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"ENDPOINT is {where!r}; write HOST:PORT of one of the hosts.")
    if not least.isdigit() or not (most or least).isdigit() or not 0 < int(least) <= int(most or least):
        raise UserError(f"HOSTS is {options.hosts!r}; write a number of hosts, or MIN:MAX.")
    at = Endpoint(host, int(port), int(least), int(most or least), options.seconds)
    started = f"HOSTS={options.hosts} RANKS={options.ranks} {shlex.join(words)}"
    join_at, address, is_host = join(lambda marker: report(run, started, host, marker, None), run, at)
    print(join_at, address, str(is_host).lower())


def print_report(options: Preflight, peer: str, run: RunConfig, words: list[str]) -> None:
    found = report(run, shlex.join(words), peer, options.marker, options.port)
    print("\n".join(in_lines(f"{found.host}/{found.node}", json.dumps(asdict(found)))))


CHECKS = {"hostfile": check_hostfile, "slurm": check_slurm, "endpoint": check_endpoint, "report": print_report}


def preflight(options: Preflight) -> None:
    words = list(options.words)
    where = words.pop(0) if options.launcher != "slurm" and words else ""
    CHECKS[options.launcher](options, where, parse_run(words), words)
