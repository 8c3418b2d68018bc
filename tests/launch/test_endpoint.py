"""The rendezvous of hosts at an endpoint."""

import socket

import pytest

from megamoe.config import RunConfig
from megamoe.errors import UserError
from megamoe.launch.endpoint import Endpoint, join
from megamoe.launch.network import free_port
from megamoe.launch.preflight import Report


def report(absent=(), shares=True):
    return Report(socket.gethostname(), "--steps 5", 0, {}, 0, list(absent), shares, "h2", "10.0.0.1", 1234, False)


def test_a_single_host_joins_by_itself(tmp_path):
    run = RunConfig(ds_config="ds.json", run_dir=str(tmp_path / "run"))
    at = Endpoint("127.0.0.1", free_port(), min_hosts=1, max_hosts=1, ranks=2, seconds=5)
    settings = join(lambda marker: report(shares=marker.is_file()), run, at)
    assert settings.is_host
    assert settings.address == settings.local_address == "127.0.0.1"


def test_a_problem_of_a_host_ends_the_rendezvous(tmp_path):
    run = RunConfig(ds_config="ds.json", run_dir=str(tmp_path / "run"))
    at = Endpoint("127.0.0.1", free_port(), min_hosts=1, max_hosts=1, ranks=2, seconds=5)
    with pytest.raises(UserError, match=r"does not see /data/train\.bin"):
        join(lambda marker: report(absent=["/data/train.bin"]), run, at)
