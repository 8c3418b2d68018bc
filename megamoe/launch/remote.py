"""Collect the reports of other hosts, over ssh or by srun."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megamoe.launch.preflight import Report
from megamoe.utils.errors import UserError

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
REPORT = "report of "  # before each of its lines
REPORT_SECONDS = 120  # a cold file system takes a while to load torch


def ask_by_ssh(hosts: list[str], command: list[str]) -> tuple[dict[str, Report], list[str]]:
    """Run `command`, which prints a report, in this folder on each host. Returns reports by host, and a sentence for
    each host that gives none."""

    def ask(host: str) -> Report:
        line = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
        printed = _run(host, [*SSH, host, line])
        if not (found := reports_in(printed)):
            raise UserError(f"{host} answers without a report; see what `ssh {host} true` prints.")
        return found[-1]

    reports, silent = {}, []
    with ThreadPoolExecutor(32) as pool:
        for host, asked in [(host, pool.submit(ask, host)) for host in hosts]:
            try:
                reports[host] = asked.result()
            except UserError as error:
                silent += error.problems
    return reports, silent


def ask_by_srun(nodes: int, command: list[str]) -> list[Report]:
    """Run `command` once on each node of this Slurm job. Raises UserError where one gives no report."""
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    reports = reports_in(_run("the Slurm job's nodes", [*srun, *command]))
    if len(reports) != nodes:
        raise UserError(
            f"{len(reports)} of {nodes} nodes have answered ({', '.join(one.host for one in reports)}); see by sinfo "
            "what state the others are in."
        )
    return reports


def in_lines(sender: str, text: str) -> list[str]:
    """A host's report in lines that srun, which joins those of all nodes, does not cut: it does above 1024 bytes.

    Args:
        sender: of no other report; nodes of a job may share a host name.
    """
    return [f"{REPORT}{sender} {text[start : start + 500]}" for start in range(0, len(text), 500)]


def reports_in(printed: str) -> list[Report]:
    """The reports among the lines that hosts have printed."""
    pieces = defaultdict[str, str](str)
    for line in printed.splitlines():
        if line.startswith(REPORT):
            sender, _, piece = line.removeprefix(REPORT).partition(" ")
            pieces[sender] += piece
    return [Report(**json.loads(text)) for text in pieces.values()]


def _run(host: str, command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REPORT_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f"{host} does not answer within {REPORT_SECONDS} s; see whether it hangs.") from None
    if done.returncode:
        told = [line.partition("error: ")[2] for line in done.stderr.splitlines() if line.startswith("error: ")]
        if told:
            raise UserError(*told)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == 255 and command[0] == "ssh":
            raise UserError(f"{host} does not answer by ssh ({last}); see that it is up and lets this host in by key.")
        raise UserError(f"{host} cannot check itself ({last}); install megamoe there at the same path.")
    return done.stdout
