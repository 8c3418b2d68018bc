"""The rendezvous of hosts at an endpoint. What a store that is lost or in use gives is in test_rendezvous.py."""

import socket
from dataclasses import asdict

import pytest

from megamoe.config.run import RunConfig
from megamoe.launch.codes import FAILED, REFUSED
from megamoe.launch.endpoint import Endpoint, _check, join
from megamoe.launch.exits import code_of
from megamoe.launch.network import free_port
from megamoe.launch.preflight import Report
from megamoe.utils.errors import UserError


def report(absent=(), shares=True, address="10.0.0.1"):
    return Report(socket.gethostname(), "--steps 5", 0, {}, list(absent), shares, "h2", address, 1234, False, [])


def join_at(tmp_path, host="127.0.0.1", hosts=1, seconds=1, absent=()):
    run = RunConfig(ds_config="ds.json", run_dir=str(tmp_path / "run"))
    at = Endpoint(host, free_port(), min_hosts=hosts, max_hosts=hosts, seconds=seconds)
    return join(lambda marker: report(absent, shares=marker.is_file()), run, at)


def test_a_single_host_joins_by_itself(tmp_path):
    where, address, is_host = join_at(tmp_path, seconds=240)
    assert is_host
    assert (address, where.partition(":")[0]) == ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(
    ("given", "said", "expected"),
    [
        ({"hosts": 2}, "1 of 2 hosts have joined", FAILED),
        ({"host": "h1.invalid"}, "cannot reach h1.invalid:", FAILED),
        ({"hosts": 2, "absent": ["/data/train.bin"]}, "does not see /data", REFUSED),  # and a host is late
    ],
)
def test_hosts_that_are_late_are_for_a_restart_to_cure_and_what_one_lacks_is_for_the_user(
    given, said, expected, tmp_path
):
    with pytest.raises(UserError, match=said) as caught:
        join_at(tmp_path, **given)
    assert code_of(caught.value) == expected


def test_the_name_of_the_endpoints_host_may_be_unknown_to_itself():
    records = {1: asdict(report(address=None)), 2: asdict(report())}
    answer = _check(records, RunConfig(ds_config="ds.json"), Endpoint("h1", 29400, 2, 2, 5))
    assert (answer["late"], answer["problems"]) == ([], [])
