"""The line between supervisor and agents, over real sockets: who gets in, what arrives, who is gone."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from cluster.hub import MAX_STRANGER, READ_AT_ONCE, Hub, Link, parse_address

TOKEN = "secret"


@contextmanager
def hub_with(*slots: int) -> Iterator[tuple[Hub, dict[int, Link]]]:
    hub = Hub("127.0.0.1", TOKEN)
    links = {slot: Link("127.0.0.1", hub.port, TOKEN, 1.0) for slot in slots}
    for slot, link in links.items():
        link.hello({"slot": slot})
    try:
        until(hub, lambda seen: len(seen) >= len(slots))
        yield hub, links
    finally:
        hub.close()
        for link in links.values():
            link.close()


def until(hub: Hub, condition: Callable[[list], bool], links: tuple[Link, ...] = ()) -> list:
    seen: list = []
    deadline = time.monotonic() + 20
    while not condition(seen):
        assert time.monotonic() < deadline, seen
        seen += hub.poll(0.02)
        for link in links:
            seen += [("link", message) for message in link.poll()]
    return seen


def test_messages_arrive_in_order_both_ways_and_longer_than_a_packet() -> None:
    with hub_with(0, 1) as (hub, links):
        assert hub.connected == [0, 1]
        text = "x" * 3_000_000
        for number in range(3):
            links[1].send({"type": "n", "number": number, "text": text})
        seen = until(hub, lambda seen: len([1 for slot, _ in seen if slot == 1]) == 3, (links[1],))
        assert [message["number"] for slot, message in seen if slot == 1] == [0, 1, 2] and seen[-1][1]["text"] == text
        hub.send(0, {"type": "do"})
        until(hub, lambda seen: ("link", {"type": "do"}) in seen, (links[0],))
        hub.send(7, {"type": "do"})  # nobody there: no error


def test_the_time_of_a_round_trip_is_known() -> None:
    with hub_with(3) as (hub, links):
        until(hub, lambda _: 3 in hub.rtt, (links[3],))
        assert 0 <= hub.rtt[3] < 20 and hub.silence(3) < 20 and hub.silence(4) == float("inf")


def test_an_agent_that_goes_is_reported_once() -> None:
    with hub_with(0, 1) as (hub, links):
        links[0].close()
        assert until(hub, lambda seen: bool(seen)) == [(0, {"type": "gone"})]
        assert hub.connected == [1] and [item for item in hub.poll(0.05) if item[0] == 0] == []


def test_a_second_agent_of_a_slot_takes_the_first_ones_place() -> None:
    with hub_with(0) as (hub, links):
        second = Link("127.0.0.1", hub.port, TOKEN, 1.0)
        second.hello({"slot": 0})
        assert [message["type"] for _, message in until(hub, lambda seen: len(seen) == 2)] == ["gone", "hello"]
        until(hub, lambda _: bool(links[0].poll() or links[0].closed))
        assert hub.connected == [0] and not second.closed
        second.close()


@pytest.mark.parametrize(
    "words",
    [
        b'{"type":"hello","slot":0,"token":"wrong"}\n',
        b'{"type":"hello","slot":0}\n',
        b'{"type":"beat","slot":0,"token":"secret"}\n',
        b'{"type":"hello","slot":"0","token":"secret"}\n',
        b'{"type":"hello","slot":-1,"token":"secret"}\n',
        b'{"type":"hello","slot":0,"token":"\\ud800"}\n',
        b'{"type":"hello","slot":0,"token":"wrong"}\n' + b"x" * 100_000,
        b"\n" + b"x" * 100_000,
        b"[1]\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * (2 * MAX_STRANGER),
        b"",
    ],
)
def test_a_stranger_is_cut_off(words: bytes) -> None:
    with hub_with(1) as (hub, _), socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(words)
        if not words:
            stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(0.02)
        closed = False
        for _ in range(200):
            assert hub.poll(0.01) == []
            try:
                closed = stranger.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                closed = True
            break
        assert closed and hub.connected == [1]


def test_a_flood_is_read_a_piece_at_a_time() -> None:
    with hub_with(0, 1) as (hub, links):
        links[0]._out = b'{"type":"n"}\n' * 1_000_000
        links[1].send({"type": "here"})
        seen: list = []
        while (1, {"type": "here"}) not in seen:
            links[0].flush()
            came = hub.poll(0.02)
            assert len(came) <= READ_AT_ONCE // 10
            seen += came


def test_strangers_without_number_keep_nobody_out() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))  # more than the 1024 at which select() ends
    try:
        with hub_with(0) as (hub, _), ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(socket.create_connection(("127.0.0.1", hub.port)))
                hub.poll(0.0)
            second = stack.enter_context(closing(Link("127.0.0.1", hub.port, TOKEN, 1.0)))
            assert second.fileno() > 1024
            second.hello({"slot": 1})
            until(hub, lambda seen: (1, "hello") in [(slot, message["type"]) for slot, message in seen])
            assert hub.connected == [0, 1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_addresses() -> None:
    assert parse_address("10.0.0.1:80") == ("10.0.0.1", 80) and parse_address("[::1]:80") == ("::1", 80)
    with pytest.raises(ValueError, match="invalid"):
        parse_address("host")
