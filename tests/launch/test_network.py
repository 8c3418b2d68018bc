"""What a host knows of its own network."""

import os

from megamoe.launch import network
from megamoe.launch.exchange import open_store
from megamoe.launch.network import address_towards, free_port, interface_towards, is_free


def test_a_loopback_names_no_interface_and_an_unknown_name_has_no_route():
    for host, address in (("127.0.0.1", "127.0.0.1"), ("no-such-host.invalid", None)):
        assert address_towards(host) == address
        assert interface_towards(host) is None


def test_free_ports_are_distinct_and_torchs_store_can_listen_there_while_no_other_call_gets_them():
    ports = [free_port() for _ in range(5)]
    assert len(set(ports)) == 5
    assert all(map(is_free, ports))
    assert max(ports) < 29_400  # torchrun's, DeepSpeed's, and those that the system gives to connections
    store = open_store("127.0.0.1", ports[0], True, 240)
    store.set("key", "value")
    assert open_store("127.0.0.1", ports[0], False, 240).get("key") == b"value"


def test_processes_that_draw_at_once_and_end_before_they_listen_have_different_ports(monkeypatch):
    """As the launch scripts do. Here, all of them are this process, which keeps nothing."""
    drawn = []
    for pid in range(70_000, 70_050):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        drawn.append(free_port())
        network._kept.clear()
    assert len(set(drawn)) == 50
