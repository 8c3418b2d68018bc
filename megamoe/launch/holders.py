"""The processes that hold a rank: its launcher's, and the launch script. A rank that has lost one saves and leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil

LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed")  # in their command lines
SHELLS = ("sh", "bash", "dash", "zsh")


def pid_space() -> str:
    """A pid means something only to processes with the same one."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot},{os.readlink('/proc/self/ns/pid')}"


class Holders:
    """The processes that hold this rank."""

    def __init__(self, has_launcher: bool, environment: Mapping[str, str]):
        """
        Args:
            has_launcher: whether DeepSpeed's launcher or torchrun has started this rank.
            environment: has the launch script's process as MEGAMOE_SCRIPT, which is "PID,PID_SPACE".
        """
        self._pairs = launchers(psutil.Process()) if has_launcher else []
        pid, _, space = environment.get("MEGAMOE_SCRIPT", "").partition(",")
        self._has_script = space == pid_space()  # else the script runs on another host
        self._script = find_process(int(pid)) if self._has_script else None

    def are_alive(self) -> bool:
        if self._has_script and not (self._script and is_alive(self._script)):
            return False
        return all(child.ppid() == parent for child, parent in self._pairs)


def launchers(process: psutil.Process) -> list[tuple[psutil.Process, int]]:
    """The launcher's processes above a rank, as pairs of a process and the id of the parent that it must keep.

    DeepSpeed has a launch.py on each host, below `deepspeed` itself, or, started over ssh, below sshd and perhaps a
    shell; torchrun has its agent. Any other parent may exit: a rank under nohup outlives its shell.
    """
    pairs = []
    parent = process.parent()
    if parent and any(name in word for word in parent.cmdline() for name in LAUNCHERS):
        pairs.append((process, parent.pid))
        above = parent.parent()
        if "deepspeed.launcher.launch" in parent.cmdline() and above:
            pairs.append((parent, above.pid))
            if above.name() in SHELLS and above.parent():
                pairs.append((above, above.ppid()))
    return pairs


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_process(pid: int) -> psutil.Process | None:
    """The process of that id, if there is one."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
