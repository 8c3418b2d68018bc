"""The two hosts, for as long as the tests of this folder run."""

import os
import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, why_impossible
from stub_rank import make_tree


def pytest_collection_modifyitems(items):
    """`make test-cluster` runs all tests of this folder, but for those that `make gpu` runs."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("gpu"):
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """A tree whose launch scripts start ranks without an engine."""
    return make_tree(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def runs():
    """A list for the runs that a test starts: they end with it."""
    started = []
    yield started
    for run in started:
        run.end()


@pytest.fixture(scope="session")
def two_hosts():
    why = why_impossible()
    if why:
        # In continuous integration no test may be skipped.
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
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
