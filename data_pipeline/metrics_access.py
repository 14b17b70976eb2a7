"""Who may read a process's metrics: TLS and a password, from one small file that stays outside run folders.

Comes in: the file of observe.metrics_access, in YAML, and a registry. Goes out: a server that answers whom it lets in.

    certificate: metrics.crt        # TLS; with key. Both are read again when they are renewed
    key: metrics.key
    user: prometheus                # HTTP basic authentication; its password from password_file, or from the environment
    password_file: metrics.password # variable SLOTSTREAM_METRICS_PASSWORD where this line is missing

Paths are taken from the file's own folder. A run's config.yaml holds the path of this file, never what is in it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import hmac
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from data_pipeline.errors import ConfigError, unknown_name

PASSWORD_VARIABLE = "SLOTSTREAM_METRICS_PASSWORD"
CLIENT_S = 10.0  # a client that says nothing for so long is let go
KEYS = ("certificate", "key", "user", "password_file")


class AccessError(OSError):
    """The rules cannot be kept, so that nothing may be served. `strerror` is the line that says why."""


@dataclass(frozen=True)
class Access:
    """Nothing set: everybody who reaches the port may read, without encryption."""

    certificate: Path | None = None
    key: Path | None = None
    user: str | None = None
    password: str = field(default="", repr=False)


def read_access(path: Path | str | None) -> Access:
    """The rules in a file; None: no rules. Raises AccessError."""
    if path is None:
        return Access()
    try:
        return _access(Path(path), _load(Path(path)))
    except (OSError, ConfigError) as error:
        text = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.filename else str(error)
        raise AccessError(errno.EACCES, f"metrics_access={path}: {text}") from None


def _load(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    text = path.read_text()
    try:
        content = OmegaConf.to_container(OmegaConf.create(text))
    except Exception:  # what a YAML parser says may quote the file
        content = None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"it does not hold key: value lines; {', '.join(KEYS)} are known")
    return {str(key): value for key, value in content.items()}


def _access(path: Path, content: dict[str, Any]) -> Access:
    for key, value in content.items():
        if key not in KEYS:
            raise unknown_name("the setting", key, KEYS)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{key} is not a text; give it a value, in quotes where it is a number")
    if ("certificate" in content) != ("key" in content):
        raise ConfigError("certificate and key belong together; give both, or neither")
    if "password_file" in content and "user" not in content:
        raise ConfigError("password_file without user; say whose password it is")
    files = {key: path.parent / content[key] for key in ("certificate", "key") if key in content}
    password = _password(path, content) if "user" in content else ""
    made = Access(files.get("certificate"), files.get("key"), content.get("user"), password)
    _context(made)  # now rather than at the first scrape
    return made


def _password(path: Path, content: dict[str, Any]) -> str:
    if "password_file" in content:
        password = (path.parent / content["password_file"]).read_text().strip()  # Prometheus strips its copy likewise
    else:
        password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password:
        raise ConfigError(f"user has no password; give password_file, or set {PASSWORD_VARIABLE}")
    return password


def _context(access: Access) -> ssl.SSLContext | None:
    if access.certificate is None or access.key is None:
        return None
    for path in (access.certificate, access.key):
        path.open("rb").close()  # names the file that cannot be read
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(access.certificate, access.key, password=lambda: b"")  # a passphrase is never prompted for
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            f"certificate {access.certificate} and key {access.key} are no pair of PEM files without a passphrase"
        ) from None
    return context


def _changed(access: Access) -> tuple[int, ...]:
    return tuple(os.stat(path).st_mtime_ns for path in (access.certificate, access.key) if path is not None)


def serve(address: str, registry: CollectorRegistry, access: Access) -> tuple[WSGIServer, threading.Thread]:
    """Answer at a free port of `address` from a daemon thread. Raises OSError when `address` is not one of this machine."""
    family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    settings = {"address_family": family, "access": access, "context": _context(access), "changed": _changed(access)}
    kind = type("Server", (_Server,), settings)
    app = make_wsgi_app(registry)
    guarded = app if access.user is None else _guarded(app, access)
    server: WSGIServer = make_server(str(place[0]), 0, guarded, kind, _Handler)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return server, thread


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request. TLS is spoken there, too: a client that is slow at it keeps no other waiting."""

    daemon_threads = True
    access = Access()
    context: ssl.SSLContext | None = None
    changed: tuple[int, ...] = ()  # when certificate and key were written

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, client = super().get_request()
        if self.context is None:
            return connection, client
        with contextlib.suppress(OSError, ConfigError):  # half a pair: the old one stays in use
            self._renew()
        return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), client

    def _renew(self) -> None:
        changed = _changed(self.access)
        if changed != self.changed:
            self.context, self.changed = _context(self.access), changed

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or spoke no TLS, is not worth a traceback in a run's log."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a run's log is no access log."""


App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def _guarded(app: Any, access: Access) -> App:
    """`app` for whoever knows the password; the time that a refusal takes tells nothing about it."""
    expected = _digest(base64.b64encode(f"{access.user}:{access.password}".encode()))

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        scheme, _, word = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        right = hmac.compare_digest(_digest(word.strip().encode("latin-1", "replace")), expected)
        if scheme.lower() == "basic" and right:
            return app(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="slotstream"'), ("Content-Type", "text/plain")])
        return [b"these metrics need a user and a password\n"]

    return answer


def _digest(word: bytes) -> bytes:
    return hashlib.sha256(word).digest()


__all__ = ["PASSWORD_VARIABLE", "Access", "AccessError", "read_access", "serve"]
