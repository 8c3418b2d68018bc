"""The memory of a container or a job, from files as the kernel writes them."""

from types import SimpleNamespace

import psutil
import pytest

from megamoe.utils import host_memory

HOST = psutil.virtual_memory()._replace(total=1000, available=900)
VERSION_2 = {"memory.max": 600, "memory.current": 500, "memory.stat": "anon 9\ninactive_file 100\n"}
VERSION_1 = {
    "memory.limit_in_bytes": 600,
    "memory.usage_in_bytes": 500,
    "memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
}


@pytest.mark.parametrize(
    ("line", "folder", "files", "limits"),
    [
        ("0::/jobs/7/step", "jobs/7", VERSION_2, (600, 200)),  # a group above it has the limit
        ("0::/jobs/7", "", VERSION_2, (600, 200)),  # a container sees its own group as the root
        ("4:memory:/jobs/7", "memory/jobs/7", VERSION_1, (600, 200)),
        ("0::/jobs/7", "jobs/7", {**VERSION_2, "memory.max": "max"}, (1000, 900)),
        ("4:memory:/", "memory", {**VERSION_1, "memory.limit_in_bytes": 2**63}, (1000, 900)),
        ("3:cpu,cpuacct:/jobs/7", "jobs/7", VERSION_2, (1000, 900)),  # of another tree
    ],
)
def test_the_memory_is_that_of_the_host_or_of_the_narrowest_group(monkeypatch, tmp_path, line, folder, files, limits):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (tmp_path / folder / name).write_text(f"{content}")
    own = tmp_path / "own"
    own.write_text(f"{line}\n")
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    monkeypatch.setattr(host_memory, "psutil", SimpleNamespace(virtual_memory=lambda: HOST))
    monkeypatch.setattr(host_memory, "Path", lambda path: own if path == "/proc/self/cgroup" else path)
    assert host_memory.memory_limits() == limits
