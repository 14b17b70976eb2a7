"""Ports that are kept for rank 0."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

from cluster.processes import Port


def has_ipv6() -> bool:
    table = Path("/proc/net/if_inet6")
    return table.exists() and "0" * 31 + "1 " in table.read_text()


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no address ::1")


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), pytest.param("::1", socket.AF_INET6, marks=IPV6)])
def test_a_port_is_free_at_its_address(address: str, family: socket.AddressFamily) -> None:
    with closing(Port(address)) as port, socket.socket(family) as server:
        server.bind((address, port.number))
        assert port.number >= 10000


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(OSError, match=r"no free TCP port at 192\.0\.2\.1 .*: Cannot assign"):  # of a range for documents
        Port("192.0.2.1")
