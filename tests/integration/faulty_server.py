"""A web server, on loopback unless told, that misbehaves on request: in front of a folder, or of another server (a proxy).

It knows ranges, ETags and the conditions on them. A fault is a function (exchange) that changes an answer; `server.faults` maps
the end of a path to a list of them: each request for it takes the next, None is a sound answer, and after the last all are sound.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Exchange:
    """An answer before it is sent."""

    status: int
    headers: dict[str, str]
    body: bytes
    send_length: bool = True  # False: the connection's end is the body's
    cut_at: int | None = None  # the connection breaks after so many bytes of the body
    pause_s: float = 0.0  # before each byte


Fault = Callable[[Exchange], None]


def status(code: int, body: bytes = b"no", **headers: str) -> Fault:
    def fault(exchange: Exchange) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        exchange.status, exchange.headers, exchange.body = code, named, body

    return fault


def page(exchange: Exchange) -> None:
    """A login page, as proxies and portals send it."""
    exchange.status, exchange.headers = 200, {"Content-Type": "text/html; charset=utf-8"}
    exchange.body = b"<!DOCTYPE html><html><title>Log in</title></html>"


def cut(at: int, *, with_length: bool = True) -> Fault:
    def fault(exchange: Exchange) -> None:
        exchange.cut_at, exchange.send_length = at, with_length

    return fault


def flipped(at: int) -> Fault:
    def fault(exchange: Exchange) -> None:
        body = bytearray(exchange.body)
        body[at] ^= 0x10
        exchange.body = bytes(body)

    return fault


def dripping(exchange: Exchange) -> None:
    exchange.pause_s = 0.05


def changed(exchange: Exchange) -> None:
    """Another object lies there from now on, and the server looks at no condition."""
    exchange.headers["ETag"] = '"another"'


@dataclass
class Request:
    path: str
    headers: dict[str, str]


@dataclass
class FaultyServer:
    """`with FaultyServer(folder) as server:` then `server.url`."""

    folder: Path | None = None
    upstream: str | None = None  # http://host:port
    address: str = "127.0.0.1"
    ranges: bool = True
    etags: bool = True
    faults: dict[str, list[Fault | None]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    on_request: Callable[[str], None] | None = None

    def __enter__(self) -> FaultyServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None: ...

        self._lock = threading.Lock()

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...  # a reader that goes away is no news

        self._server = Server((self.address, 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://{self.address}:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self, ending: str) -> int:
        return sum(request.path.split("?")[0].endswith(ending) for request in self.requests)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        with self._lock:
            self.requests.append(Request(handler.path, dict(handler.headers)))
            faults = next((faults for ending, faults in self.faults.items() if path.endswith(ending)), [])
            fault = faults.pop(0) if faults else None
        if self.on_request:
            self.on_request(path)
        exchange = self._from_folder(handler, self.folder / path.lstrip("/")) if self.folder else self._from_upstream(handler)
        if fault is not None:
            fault(exchange)
        _send(handler, exchange)

    def _from_folder(self, handler: BaseHTTPRequestHandler, path: Path) -> Exchange:
        try:
            content = path.read_bytes()
        except OSError:
            return Exchange(404, {}, b"nothing here")
        tag = '"' + hashlib.md5(content).hexdigest() + '"'
        headers = {"Content-Type": "application/octet-stream"} | ({"ETag": tag} if self.etags else {})
        if handler.headers.get("If-Match", tag) != tag:
            return Exchange(412, headers, b"")
        if handler.headers.get("If-None-Match") == tag:
            return Exchange(304, headers, b"")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if asked is None or not self.ranges:
            return Exchange(200, headers, content)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return Exchange(416, headers | {"Content-Range": f"bytes */{len(content)}"}, b"")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Exchange(206, headers, content[first : last + 1])

    def _from_upstream(self, handler: BaseHTTPRequestHandler) -> Exchange:
        asked = urllib.request.Request(f"{self.upstream}{handler.path}", headers=dict(handler.headers))
        try:
            answer = urllib.request.urlopen(asked)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            kept = ("content-type", "content-range", "etag", "last-modified")
            headers = {name: value for name, value in answer.headers.items() if name.lower() in kept}
            return Exchange(answer.status, headers, answer.read())


def _send(handler: BaseHTTPRequestHandler, exchange: Exchange) -> None:
    body = exchange.body if exchange.cut_at is None else exchange.body[: exchange.cut_at]
    broken = exchange.cut_at is not None or not exchange.send_length
    try:
        handler.send_response(exchange.status)
        for name, value in exchange.headers.items():
            handler.send_header(name, value)
        if exchange.send_length:
            handler.send_header("Content-Length", str(len(exchange.body)))
        if broken:
            handler.send_header("Connection", "close")
        handler.end_headers()
        if exchange.pause_s:
            for byte in body:
                time.sleep(exchange.pause_s)
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
        else:
            handler.wfile.write(body)
    except OSError:  # the reader went away
        broken = True
    handler.close_connection = broken or handler.close_connection
