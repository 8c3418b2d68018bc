"""The rendezvous of hosts at an endpoint."""

import socket
from dataclasses import asdict

import pytest

from megamoe.config.run import RunConfig
from megamoe.launch import endpoint
from megamoe.launch.endpoint import Endpoint, join
from megamoe.launch.exchange import open_store
from megamoe.launch.exits import FAILED, REFUSED, code_of
from megamoe.launch.network import free_port
from megamoe.launch.preflight import Report
from megamoe.utils.errors import UserError


def report(absent=(), shares=True, address="10.0.0.1"):
    return Report(socket.gethostname(), "--steps 5", 0, {}, 0, list(absent), shares, "h2", address, 1234, False)


def test_a_single_host_joins_by_itself(tmp_path):
    run = RunConfig(ds_config="ds.json", run_dir=str(tmp_path / "run"))
    at = Endpoint("127.0.0.1", free_port(), min_hosts=1, max_hosts=1, ranks=2, seconds=240)
    settings = join(lambda marker: report(shares=marker.is_file()), run, at)
    assert settings.is_host
    assert settings.address == settings.local_address == "127.0.0.1"


def refusal(tmp_path, host="127.0.0.1", port=None, hosts=1, seconds=1, **found):
    """What a host is told that cannot join, and the exit code."""
    at = Endpoint(host, port or free_port(), min_hosts=hosts, max_hosts=hosts, ranks=2, seconds=seconds)
    with pytest.raises(UserError) as caught:
        join(lambda marker: report(**found), RunConfig(ds_config="ds.json", run_dir=str(tmp_path / "run")), at)
    return str(caught.value), code_of(caught.value)


def test_hosts_that_are_late_or_out_of_reach_are_for_a_restart_to_cure(tmp_path, monkeypatch):
    said, code = refusal(tmp_path, hosts=2)
    assert ("1 of 2 hosts have joined" in said, code) == (True, FAILED)
    said, code = refusal(tmp_path, host="h1.invalid")
    assert ("cannot resolve h1.invalid" in said, code) == (True, FAILED)
    monkeypatch.setattr(endpoint, "_is_here", lambda host, deadline: False)
    said, code = refusal(tmp_path)
    assert ("it cannot be reached from here within 1 s" in said, code) == (True, FAILED)


def test_an_endpoint_that_is_lost_while_hosts_join_is_for_a_restart_to_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_is_here", lambda host, deadline: False)
    monkeypatch.setattr(endpoint, "ANSWER_SECONDS", 0)
    port = free_port()
    store = open_store("127.0.0.1", port, True, 240)  # which gives no answer
    store.set("marker", "")
    said, code = refusal(tmp_path, port=port)
    assert ("has lost 127.0.0.1:" in said, code) == (True, FAILED)


def test_a_busy_port_and_what_a_host_lacks_are_for_the_user_to_change(tmp_path):
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        said, code = refusal(tmp_path, port=busy.getsockname()[1])
    assert ("its port is in use" in said, code) == (True, REFUSED)
    said, code = refusal(tmp_path, hosts=2, absent=["/data/train.bin"])  # and a host is late
    assert ("1 of 2 hosts have joined" in said, "does not see /data" in said, code) == (True, True, REFUSED)


def test_the_name_of_the_endpoints_host_may_be_unknown_to_itself():
    one, other = report(address=None), report()
    answer = endpoint._check(
        {1: asdict(one), 2: asdict(other)}, 1, RunConfig(ds_config="ds.json"), Endpoint("h1", 29400, 2, 2, 1, 5)
    )
    assert (answer["late"], answer["problems"]) == ([], [])
