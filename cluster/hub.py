"""The supervisor's line to its agents: TCP, one JSON object a line. Hub is the supervisor's end, Link an agent's.

The first line of a connection must carry the session's token; whoever does not know it is cut off. One thread, nothing blocks.
"""

from __future__ import annotations

import hmac
import json
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

MAX_STRANGER = 16 * 1024  # bytes of a first line
MOST_STRANGERS = 512  # at a time; the oldest give way
MAX_LINE = 8 * 1024 * 1024  # stacks of many threads are long
READ_AT_ONCE = 1024 * 1024  # bytes of one connection in a turn: nobody keeps the others waiting
HELLO_WITHIN = 10.0
PING_EVERY = 1.0
REFUSED_WITHIN = 2.0

Message = dict[str, Any]


class Wire:
    """One connection: bytes in both directions, cut into messages. Never blocks, never raises."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.closed = False
        self.heard = time.monotonic()
        self._in = b""
        self._out = b""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def waiting(self) -> bool:
        """Something is left to be sent."""
        return bool(self._out)

    def send(self, message: Message) -> None:
        if not self.closed:
            self._out += json.dumps(message, separators=(",", ":")).encode() + b"\n"
            self.flush()

    def flush(self) -> None:
        while self._out and not self.closed:
            try:
                self._out = self._out[self.socket.send(self._out) :]
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close()

    def receive(self, limit: int = MAX_LINE) -> list[Message]:
        """The messages that are there, or the first of many. What is no JSON object, or too long, closes the connection."""
        taken = 0
        while not self.closed and taken < min(limit, READ_AT_ONCE):
            try:
                data = self.socket.recv(min(limit, 1 << 16))
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            if not data:
                self.close()
                break
            self.heard = time.monotonic()
            self._in += data
            taken += len(data)
        *lines, self._in = self._in.split(b"\n")
        if len(self._in) > limit:
            self.close()
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.close()
                break
            messages.append(message)
        return messages

    def close(self) -> None:
        self.closed = True
        self.socket.close()


class Hub:
    """Listens; knows one connection per slot: its agent's newest."""

    def __init__(self, address: str, token: str, port: int = 0) -> None:
        """Raises OSError when the address is not this machine's or the port is taken."""
        self._token = token
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, port), family=family, backlog=256)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self.rtt: dict[int, float] = {}  # seconds, of each slot's last answer
        self._strangers: dict[Wire, float] = {}
        self._wires: dict[int, Wire] = {}
        self._next_ping = 0.0

    @property
    def connected(self) -> list[int]:
        return sorted(slot for slot, wire in self._wires.items() if not wire.closed)

    def silence(self, slot: int) -> float:
        """Seconds since the slot's agent was last heard; infinite when it is not connected."""
        wire = self._wires.get(slot)
        return float("inf") if wire is None or wire.closed else time.monotonic() - wire.heard

    def send(self, slot: int, message: Message) -> None:
        """To an agent that is gone: nothing; the next poll says that it is."""
        if slot in self._wires:
            self._wires[slot].send(message)

    def drop(self, slot: int) -> None:
        """Forget the slot's connection."""
        wire = self._wires.pop(slot, None)
        self.rtt.pop(slot, None)
        if wire is not None:
            wire.close()

    def poll(self, timeout: float, also: Sequence[int] = ()) -> list[tuple[int, Message]]:
        """(slot, message) of all that came, after `timeout` seconds at most, or when a descriptor of `also` is readable.

        The messages "hello" (first of every connection) and "gone" (the connection ended) are among them.
        """
        self._ping()
        wires = [*self._strangers, *(wire for wire in self._wires.values() if not wire.closed)]
        poller = select.poll()  # select() itself ends at descriptor 1023
        poller.register(self._server, select.POLLIN)
        for wire in wires:
            if not wire.closed:
                poller.register(wire, select.POLLIN | (select.POLLOUT if wire.waiting else 0))
        for descriptor in also:
            poller.register(descriptor, select.POLLIN)
        poller.poll(max(0.0, timeout) * 1000)
        for wire in wires:
            wire.flush()
        self._accept()
        found = self._greet()
        for slot, wire in list(self._wires.items()):
            for message in wire.receive():
                if message.get("type") == "pong":
                    self.rtt[slot] = max(0.0, time.monotonic() - float(message.get("sent", 0.0)))
                else:
                    found.append((slot, message))
            if wire.closed:
                self.drop(slot)
                found.append((slot, {"type": "gone"}))
        return found

    def close(self) -> None:
        for wire in [*self._strangers, *self._wires.values()]:
            wire.close()
        self._server.close()

    def _ping(self) -> None:
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + PING_EVERY
            for wire in self._wires.values():
                wire.send({"type": "ping", "sent": now})

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            if len(self._strangers) >= MOST_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.close()
            self._strangers[Wire(connection)] = time.monotonic() + HELLO_WITHIN

    def _greet(self) -> list[tuple[int, Message]]:
        """Make known wires of strangers that know the token; cut off the others."""
        found: list[tuple[int, Message]] = []
        for wire, deadline in list(self._strangers.items()):
            messages = wire.receive(MAX_STRANGER)
            if not messages and not wire.closed and time.monotonic() < deadline:
                continue
            del self._strangers[wire]
            slot = self._slot_of(messages[0]) if messages else None
            if slot is None:
                wire.close()
                continue
            if slot in self._wires:
                self.drop(slot)
                found.append((slot, {"type": "gone"}))
            self._wires[slot] = wire
            found += [(slot, message) for message in messages]
        return found

    def _slot_of(self, hello: Message) -> int | None:
        token, slot = hello.pop("token", None), hello.get("slot")
        known = isinstance(token, str) and hmac.compare_digest(token.encode(errors="surrogatepass"), self._token.encode())
        return slot if known and hello.get("type") == "hello" and type(slot) is int and slot >= 0 else None


class Link(Wire):
    """An agent's connection to the hub."""

    def __init__(self, host: str, port: int, token: str, patience: float) -> None:
        """Connects, trying again for `patience` seconds: the hub of a big job answers late. Raises OSError.

        A hub listens before its agents are placed: a host that refuses for a while has none any more.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                super().__init__(socket.create_connection((host, port), timeout=5.0))
                break
            except OSError as error:
                now = time.monotonic()
                if now > deadline:
                    raise
                if isinstance(error, ConnectionRefusedError):
                    deadline = min(deadline, now + REFUSED_WITHIN)
                time.sleep(0.2)
        self._token = token

    @property
    def address(self) -> str:
        """This side's address: where the other nodes reach this one."""
        return str(self.socket.getsockname()[0])

    def hello(self, facts: Message) -> None:
        self.send({"type": "hello", "token": self._token, **facts})

    def poll(self) -> list[Message]:
        """The messages that are there; pings are answered here."""
        self.flush()
        found = []
        for message in self.receive():
            if message.get("type") == "ping":
                self.send({"type": "pong", "sent": message.get("sent")})
            else:
                found.append(message)
        return found


def parse_address(text: str) -> tuple[str, int]:
    """("host", port) of HOST:PORT; an IPv6 host stands in brackets. Raises ValueError."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
