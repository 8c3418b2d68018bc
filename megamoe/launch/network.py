"""What this host knows of its own network: a free port, and the address and interface on the way to another host."""

from __future__ import annotations

import os
import socket
import zlib
from collections import deque

import psutil

from megamoe.launch.holders import pid_space

# Below those that Linux gives to connections, unless ip_local_port_range is changed, and those of Kubernetes' services;
# without 29400 and 29500, which torchrun and DeepSpeed take by default.
LISTENING_PORTS = range(20_000, 29_000)
SPACING = 61  # ports between the first ones of two processes that follow each other, for those that are taken
_kept: deque[socket.socket] = deque(maxlen=64)  # what this process has drawn last


def free_port() -> int:
    """A TCP port that is free and that no other call on this host gives before a server listens on it.

    Each process begins at another port, for it may end before the port is used. And the port stays bound to this
    process, which keeps it from other calls but not from a server with SO_REUSEADDR, as torch's is.
    """
    first = zlib.crc32(pid_space().encode()) + SPACING * os.getpid()
    for place in range(first, first + len(LISTENING_PORTS)):
        port = LISTENING_PORTS[place % len(LISTENING_PORTS)]
        probe = socket.socket()
        try:
            probe.bind(("", port))
        except OSError:
            probe.close()
            continue
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _kept.append(probe)
        return port
    raise OSError(f"no port from {LISTENING_PORTS[0]} to {LISTENING_PORTS[-1]} is free")


def is_free(port: int) -> bool:
    """Whether a server can listen on the TCP port."""
    return _can_bind("", port)


def is_own(address: str) -> bool:
    """Whether this host has the address: only then can a socket be bound to it."""
    return _can_bind(address, 0)


def _can_bind(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port just released is free
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def address_towards(host: str) -> str | None:
    """This host's own IPv4 address on the route to `host`; None without a route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """Name of the network interface on the route to `host`; None for a loopback or without a route."""
    own = address_towards(host)
    if own is None or own.startswith("127."):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == own for one in addresses):
            return name
    return None
