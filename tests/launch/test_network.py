"""What a host knows of its own network."""

import socket

from megamoe.launch.network import address_towards, free_port, interface_towards, is_free


def test_the_route_to_this_host_is_a_loopback_and_names_no_interface():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") is None


def test_there_is_no_route_to_an_unknown_name():
    assert address_towards("no-such-host.invalid") is None
    assert interface_towards("no-such-host.invalid") is None


def test_a_free_port_is_not_one_that_the_system_gives_to_connections():
    for _ in range(20):
        port = free_port()
        assert is_free(port)
        assert port < 32_768  # where they begin by default (net.ipv4.ip_local_port_range)


def test_a_port_with_a_server_is_not_free():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not is_free(server.getsockname()[1])
