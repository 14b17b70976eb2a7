"""Fetching: bytes of one object behind a URL, in one answer of a server. Part of data_pipeline.remote.

Comes in: the URL of a split. Goes out: a Body for each request, or an error that says whether another attempt can help. What
speaks to a server is found in data_pipeline.remote.schemes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from data_pipeline.errors import FetchError


class Broken(Exception):
    """An answer that another attempt may better: no connection, a busy server, a body that ended early."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # what the server asked for


class NotFound(FetchError):
    """There is no such object."""


class Refused(FetchError):
    """Reading the object is not allowed."""


class NoRanges(FetchError):
    """The server sends whole objects only."""


class NotModified(Exception):
    """The object is still the one whose tag was given."""


class Body(Protocol):
    """An object's bytes from `start` on, as they arrive. A context manager: leaving it gives the connection back."""

    start: int
    total: int | None  # bytes of the whole object, where the server says so
    tag: str | None  # changes when the object changes: its ETag, else its time of modification
    content_type: str

    def __enter__(self) -> Body: ...

    def __exit__(self, *error: object) -> None: ...

    def chunks(self) -> Iterator[bytes]:
        """Raises Broken when the connection fails or stalls. A body may also just end early: count."""


class Fetcher(Protocol):
    """Safe to use from several threads."""

    def open(self, name: str, start: int = 0, stop: int | None = None, tag: str | None = None, known: str | None = None) -> Body:
        """Ask for bytes [start, stop) of an object below the root.

        The server may send more: look at `start` of the body. `tag`: only if the object is still that one. `known`: only if it
        is not that one any more. Raises Broken, NotModified, FetchError.
        """

    def where(self, name: str) -> str:
        """The object's address for messages, without secrets."""

    def close(self) -> None: ...
