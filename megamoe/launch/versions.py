"""The versions that a host must have, and those that must be the same on every host of a job.

Imports nothing but the standard library: a host that lacks a package can still say which.
"""

from __future__ import annotations

import hashlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import megamoe

PACKAGES = ("torch", "deepspeed")


def versions() -> dict[str, str]:
    """This host's version of each thing that every host must have alike."""
    source = source_digest(Path(megamoe.__file__).parent)
    return {
        "megamoe": f"{megamoe.__version__} (source {source})",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def source_digest(package: Path) -> str:
    """Digest of the Python files below a package's folder, by path and content: two checkouts of one version can
    differ."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:8]


def version_problems(hosts: dict[str, dict[str, str]]) -> list[str]:
    """One sentence for each package whose version on a host differs from the first host's."""
    first, *others = hosts
    return [
        f"{host} has {package} {hosts[host].get(package)}, but {first} has {wanted}; install the same on every host."
        for host in others
        for package, wanted in hosts[first].items()
        if hosts[host].get(package) != wanted
    ]


def absent_packages(pyproject: Path) -> list[str]:
    """What pyproject.toml requires and this Python lacks."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", pyproject.read_text(), re.MULTILINE | re.DOTALL)
    assert listed
    absent = []
    for package in re.findall(r'"([\w.-]+)[^";]*"', listed[1]):  # without those of some Pythons only
        try:
            version(package)
        except PackageNotFoundError:
            absent.append(package)
    return absent
