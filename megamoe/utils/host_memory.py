"""What this process may use of its host's memory: the limits of a container or a job are those of control groups."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
FILES = {  # by version: of the limit, of what is used, and the line of what of it are cached files
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_limits() -> tuple[int, int]:
    """Bytes that this process, with the others of its host, container or job, can have at most; and could still
    take."""
    host = psutil.virtual_memory()
    limit, available = host.total, host.available
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller not in FILES:
            continue
        folder = ROOT / controller / path.lstrip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit there
                most, used = (int((group / name).read_text()) for name in FILES[controller][:2])
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # The system gives up cached files first.
                available = min(available, most - used + int(statistics[FILES[controller][2]]))
                limit = min(limit, most)
    return limit, available
