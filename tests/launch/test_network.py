"""What a host knows of its own network."""

from megamoe.launch.network import address_towards, interface_towards


def test_the_route_to_this_host_is_a_loopback_and_names_no_interface():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") is None


def test_there_is_no_route_to_an_unknown_name():
    assert address_towards("no-such-host.invalid") is None
    assert interface_towards("no-such-host.invalid") is None
