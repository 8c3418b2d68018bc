"""The two hosts, for as long as the tests of this folder run."""

import os
import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, install, why_impossible


@pytest.fixture(scope="session")
def two_hosts():
    why = why_impossible()
    if why:
        # In continuous integration nothing may go unseen.
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
