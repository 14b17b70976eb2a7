"""Transfers: an object, or a piece of it, through as many answers of the server as it takes.

Comes in: a Fetcher, a name, the size from the index. Goes out: exactly these bytes, in order. That they are the right ones is for
the caller to check: it knows the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data_pipeline.errors import FetchError
from data_pipeline.remote.fetch import Body, Broken, Fetcher, NoRanges
from data_pipeline.remote.patience import Patience

PAGE_STARTS = (b"<!doctype", b"<html")
Count = Callable[..., None]  # count(retries=1, fetched_bytes=n)


def whole(fetcher: Fetcher, name: str, size: int, patience: Patience, count: Count) -> Iterator[bytes]:
    """An object from the first to the last byte; a body that breaks off is taken up where it ended.

    Raises FetchError when the object has another size, changes under way, is a web page, or the patience ends.
    """
    done, tag = 0, None
    while done < size:
        try:
            with fetcher.open(name, done, None, tag) as body:
                _check_body(fetcher, name, body, size)
                tag = tag or body.tag
                for chunk in _skip(body.chunks(), done - body.start):
                    if not done:
                        _refuse_page(fetcher, name, body, chunk)
                    done += len(chunk)
                    if done > size:
                        raise _wrong_size(fetcher, name, f"more than {size}", size)
                    count(fetched_bytes=len(chunk))
                    patience.received(len(chunk))
                    yield chunk
            if done < size:
                raise Broken(f"the body ended after {done} of {size} bytes")
        except Broken as error:
            patience.wait(error)
            count(retries=1)


def piece(
    fetcher: Fetcher, name: str, size: int, start: int, out: memoryview, tag: str | None, patience: Patience, count: Count
) -> str | None:
    """Fill `out` from byte `start` of an object of `size` bytes; returns the object's tag, to be given the next time."""
    done = 0
    while done < len(out):
        try:
            with fetcher.open(name, start + done, start + len(out), tag) as body:
                _check_body(fetcher, name, body, size)
                if body.start != start + done:
                    raise NoRanges(
                        f"{fetcher.where(name)}: the server sends the whole object where a part was asked for; "
                        f"ranges are needed; set data.remote.mode=whole"
                    )
                tag = tag or body.tag
                for chunk in body.chunks():
                    part = chunk[: len(out) - done]
                    out[done : done + len(part)] = part
                    done += len(part)
                    count(fetched_bytes=len(chunk))
                    patience.received(len(part))
                    if done == len(out):
                        break
            if done < len(out):
                raise Broken(f"the body ended after {done} of {len(out)} bytes")
        except Broken as error:
            patience.wait(error)
            count(retries=1)
    return tag


def small(fetcher: Fetcher, name: str, patience: Patience, count: Count, known: str | None = None) -> tuple[bytes, str | None]:
    """(bytes, tag) of an object of unknown size. Raises NotModified when it is still the one whose tag is `known`."""
    while True:
        try:
            with fetcher.open(name, known=known) as body:
                content = b"".join(body.chunks())
                _refuse_page(fetcher, name, body, content)
                count(fetched_bytes=len(content))
                if body.total not in (None, len(content)):
                    raise Broken(f"the body ended after {len(content)} of {body.total} bytes")
                return content, body.tag
        except Broken as error:
            patience.wait(error)
            count(retries=1)


def exists(fetcher: Fetcher, name: str, patience: Patience) -> None:
    """Raises NotFound when there is no such object, FetchError when it cannot be known."""
    while True:
        try:
            with fetcher.open(name):
                return
        except Broken as error:
            patience.wait(error)


def _check_body(fetcher: Fetcher, name: str, body: Body, size: int) -> None:
    if body.total is None or body.total == size:
        return
    if body.start == 0:
        for chunk in body.chunks():
            _refuse_page(fetcher, name, body, chunk)
            break
    raise _wrong_size(fetcher, name, str(body.total), size)


def _refuse_page(fetcher: Fetcher, name: str, body: Body, head: bytes) -> None:
    """A login or error page often comes with status 200."""
    start = head[:64].lstrip().lower()
    if start.startswith(PAGE_STARTS) or (body.content_type == "text/html" and start.startswith(b"<")):
        text = " ".join(head[:60].decode("ascii", "replace").split())
        raise FetchError(
            f"{fetcher.where(name)}: a web page came, {body.content_type or 'of no type'}, beginning {text!r}; the object itself "
            f"is needed; log in, renew the token of the URL or correct data.root"
        )


def _wrong_size(fetcher: Fetcher, name: str, found: str, size: int) -> FetchError:
    return FetchError(
        f"{fetcher.where(name)}: {found} bytes, the index has {size}; shards and index must belong together; "
        f"upload both again, shards first"
    )


def _skip(chunks: Iterator[bytes], unwanted: int) -> Iterator[bytes]:
    """All but the first bytes: a server that knows no ranges starts over."""
    for chunk in chunks:
        if unwanted < len(chunk):
            yield chunk[unwanted:] if unwanted else chunk
        unwanted = max(0, unwanted - len(chunk))


__all__ = ["Count", "exists", "piece", "small", "whole"]
