"""Addresses of this machine: what the hub listens at, and where other nodes reach it."""

from __future__ import annotations

import fcntl
import socket
import struct

from cluster.config import LaunchConfig, LaunchError

SIOCGIFADDR = 0x8915
LOOPBACK = "127.0.0.1"
ANY = ("0.0.0.0", "::")


def hub_address(config: LaunchConfig, backend: str) -> str:
    """Where to listen: --listen, the address of --interface, loopback when all nodes are here, else this host's own.

    Raises: LaunchError for an interface that is not there.
    """
    if config.listen:
        return config.listen
    if config.interface:
        return interface_address(config.interface)
    return LOOPBACK if backend == "local" else own_address()


def reachable(address: str, port: int) -> str:
    """HOST:PORT that agents connect to."""
    host = own_address() if address in ANY else address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def interface_address(name: str) -> str:
    """IPv4 address of a network interface. Raises: LaunchError when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            names = ", ".join(sorted(label for _, label in socket.if_nameindex()))
            raise LaunchError(f"--interface {name}; no interface with an address has that name; there are {names}") from None
    return socket.inet_ntoa(answer[20:24])


def own_address() -> str:
    """The address from which this host speaks to others; loopback where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a range for documents: a datagram socket sends nothing to connect
            return str(probe.getsockname()[0])
        except OSError:
            pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return LOOPBACK
