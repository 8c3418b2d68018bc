"""The two hosts, for as long as the tests of this folder run, and a table of how long each end took."""

import contextlib
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cluster import Cluster, install, why_impossible


@pytest.fixture(scope="session")
def two_hosts():
    why = why_impossible()
    if why:
        # In continuous integration no test may be skipped.
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    install()
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def cluster(two_hosts):
    yield two_hosts
    two_hosts.restore()


@pytest.fixture(scope="session")
def slurm(two_hosts):
    two_hosts.start_slurm()
    return two_hosts


ENDINGS = pytest.StashKey()


@pytest.fixture(scope="session")
def ending(request):
    """`with ending(CASE) as end: ...; end.code = ...` puts a row into the table that is printed after the tests."""
    rows = request.config.stash.setdefault(ENDINGS, [])

    @contextlib.contextmanager
    def measured(case):
        end = SimpleNamespace(code="")
        started = time.monotonic()
        yield end
        rows.append((case, time.monotonic() - started, end.code))

    return measured


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ENDINGS, [])
    if rows:
        terminalreporter.section("how long it took")
    for case, seconds, code in rows:
        terminalreporter.write_line(f"{case:75s} {seconds:6.1f} s  {code}")
