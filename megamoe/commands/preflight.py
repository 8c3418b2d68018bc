"""Check the hosts of a job before ranks are started on them; the launch scripts call it.

    python tools/preflight.py hostfile HOSTFILE -- --ds_config FILE [options of pretrain.py]
    python tools/preflight.py slurm -- ...          in a Slurm job
    python tools/preflight.py endpoint HOST:PORT --hosts 2 -- ...       on each host, before torchrun

Exits with one sentence for each problem and code 2; for endpoint 1, if hosts are only late or out of reach. Else the
last line printed holds, for the first two, the name, the address and a free port of rank 0's host, and the run folder;
for endpoint, the address and port where torchrun's agents join, this host's address, and whether they join here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from megamoe.config import cli
from megamoe.config.run import RunConfig, parse_run
from megamoe.launch.endpoint import Endpoint, join
from megamoe.launch.preflight import marker_next_to, problems, report
from megamoe.launch.rank_info import hosts_of
from megamoe.launch.remote import ask_by_srun, ask_by_ssh
from megamoe.utils.errors import Problems, UserError


def parse(words: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="preflight.py", description="Check the hosts of a job before ranks are started on them.")
    parser.add_argument("launcher", choices=CHECKS)
    parser.add_argument(
        "where", nargs="?", help="the hostfile; HOST:PORT, where torchrun's hosts join; or another host"
    )
    port, number = whole_number("MASTER_PORT", 65535), whole_number("MIN_HOSTS", 10**6)
    parser.add_argument("--port", type=port, help="to be used on the first host; by default a free one")
    parser.add_argument("--min_hosts", type=number, help="leave out hosts that do not answer, if so many do")
    parser.add_argument("--usable", type=Path, help="hostfile to write, with the hosts that answer")
    parser.add_argument("--hosts", default="1", help="for endpoint: how many join, or MIN:MAX")
    parser.add_argument("--ranks", type=whole_number("RANKS", 10**6), help="for endpoint: ranks of each host")
    seconds = whole_number("JOIN_TIMEOUT", 10**6)
    parser.add_argument("--seconds", type=seconds, default=300, help="for endpoint: how long to wait for the hosts")
    parser.add_argument("--marker", type=Path, help="for report: a file that this host should see")
    return parser.parse(words)


def whole_number(variable: str, most: int) -> Callable[[str], int]:
    """Reads what was given to a launch script by this variable. Raises UserError."""

    def read(given: str) -> int:
        if not given.isdecimal() or not 1 <= int(given) <= most:
            raise UserError(f"{variable} is {given!r}; give a whole number from 1 to {most}.")
        return int(given)

    return read


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


def command_of_report(args: argparse.Namespace, peer: str, marker: Path, words: list[str]) -> list[str]:
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), "report", peer, "--marker", str(marker)]
    return [*command, *(["--port", str(args.port)] if args.port else []), "--", *words]


def check_hostfile(args: argparse.Namespace, run: RunConfig, words: list[str]) -> None:
    slots = read_hostfile(Path(args.where))
    hosts = list(slots)
    with marker_next_to(run.folder) as marker:
        # The last host's route to itself does not matter: only the first host's counts.
        reports, silent = ask_by_ssh(hosts, command_of_report(args, hosts[-1], marker, words))
    if silent and len(reports) < (args.min_hosts or len(hosts)):
        raise UserError(*silent)
    for problem in silent:
        print(f"continuing without a host: {problem}", file=sys.stderr)
    if hosts[-1] not in reports:  # so no host can find a route to it
        reports = {host: replace(one, address=one.address or host) for host, one in reports.items()}
    Problems(problems(list(reports.values()), run)).refuse()
    if args.usable:
        args.usable.write_text("".join(f"{host} slots={slots[host]}\n" for host in reports))
    first = next(iter(reports))
    print(first, reports[first].address or first, reports[first].port, run.folder)


def check_slurm(args: argparse.Namespace, run: RunConfig, words: list[str]) -> None:
    if "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError("this is not a Slurm job; start it by sbatch launch_scripts/slurm.sbatch.")
    hosts = hosts_of(os.environ["SLURM_JOB_NODELIST"])
    with marker_next_to(run.folder) as marker:
        reports = ask_by_srun(len(hosts), command_of_report(args, hosts[-1], marker, words))
    reports.sort(key=lambda one: one.node)
    Problems(problems(reports, run)).refuse()
    print(reports[0].host, reports[0].address or hosts[0], reports[0].port, run.folder)


def check_endpoint(args: argparse.Namespace, run: RunConfig, words: list[str]) -> None:
    host, _, port = (args.where or "").rpartition(":")
    least, _, most = args.hosts.partition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"ENDPOINT is {args.where!r}; write HOST:PORT of one of the hosts.")
    if not least.isdigit() or not (most or least).isdigit() or not 0 < int(least) <= int(most or least):
        raise UserError(f"HOSTS is {args.hosts!r}; write a number of hosts, or MIN:MAX.")
    at = Endpoint(host, int(port), int(least), int(most or least), args.seconds)
    started = f"HOSTS={args.hosts} RANKS={args.ranks} {shlex.join(words)}"
    where, address, is_host = join(lambda marker: report(run, started, host, marker, None), run, at)
    print(where, address, str(is_host).lower())


def print_report(args: argparse.Namespace, run: RunConfig, words: list[str]) -> None:
    print(json.dumps(asdict(report(run, shlex.join(words), args.where, args.marker, args.port))))


CHECKS = {"hostfile": check_hostfile, "slurm": check_slurm, "endpoint": check_endpoint, "report": print_report}


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args, options = parse(words[:split]), words[split + 1 :]
    CHECKS[args.launcher](args, parse_run(options), options)
