"""Objects over HTTP(S), with ranges and validators. Every scheme ends here: s3 and gs only sign the URLs that are asked for.

Proxies, ~/.netrc and certificates come from the environment as for any program built on requests. Error texts never quote those
of the libraries: they hold the URL, and a URL may hold a token.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import ssl
import time
from collections.abc import Callable, Iterator

import requests
import urllib3.exceptions

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import FetchError
from data_pipeline.remote.address import join, shown
from data_pipeline.remote.fetch import Broken, NotFound, NotModified, Refused

CHUNK = 1 << 18
STALL_BYTES = 1 << 16  # less than this in `stall_s` is no connection any more
RETRIED = {408, 425, 429, 500, 502, 503, 504}
RETRIED_CODES = {"RequestTimeout", "SlowDown", "InternalError"}  # S3's names, whatever the status
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
MAX_WAIT_S = 3600.0


class HttpFetcher:
    """Objects below a URL. `sign` makes the URL to ask for from the object's address; None: it is that address."""

    def __init__(self, root: str, config: RemoteConfig, sign: Callable[[str], str] | None = None) -> None:
        self.root, self.config, self._sign = root, config, sign
        self._session = requests.Session()
        # A body that the library unpacks would not be the bytes that the index knows.
        self._session.headers["Accept-Encoding"] = "identity"
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=32)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def open(
        self, name: str, start: int = 0, stop: int | None = None, tag: str | None = None, known: str | None = None
    ) -> HttpBody:
        """See Fetcher.open."""
        url = join(self.root, name)
        headers = _range(start, stop) | _only_if(tag) | ({"If-None-Match": known} if known and _is_etag(known) else {})
        timeout = (min(self.config.stall_s, 30.0), self.config.stall_s)
        try:
            response = self._session.get(
                url if self._sign is None else self._sign(url),
                headers=headers,
                stream=True,
                timeout=timeout,
                auth=None if self._sign is None else _unsigned,
            )
        except FAILURES as error:
            raise self._failure(name, error) from None
        try:
            return self._accept(name, response, start, tag)
        except BaseException:
            response.close()
            raise

    def where(self, name: str) -> str:
        return shown(join(self.root, name))

    def close(self) -> None:
        self._session.close()

    def _accept(self, name: str, response: requests.Response, start: int, tag: str | None) -> HttpBody:
        if response.status_code not in (200, 206):
            self._refuse(name, response)
        first, total = _span(response)
        body = HttpBody(response, first, total, self.config.stall_s)
        if first not in (0, start):
            raise Broken(f"bytes from {first} came, from {start} were asked for")
        if tag and body.tag and body.tag != tag:
            raise self._changed(name)
        return body

    def _refuse(self, name: str, response: requests.Response) -> None:
        """Raise what the status means."""
        status, where = response.status_code, self.where(name)
        if status == 304:
            raise NotModified
        if status in (412, 416):
            raise self._changed(name)
        code = _service_code(response)
        said = f"status {status}{code and ' ' + code}"
        if status in RETRIED or code in RETRIED_CODES:
            raise Broken(said, _retry_after(response))
        if status in (404, 410):
            raise NotFound(f"{where}: {said}; the object must exist; check data.root and that the upload is complete")
        region = response.headers.get("x-amz-bucket-region")
        if region and status in (301, 307, 400):
            raise FetchError(f"{where}: {said}; the bucket lies in region {region}; set AWS_REGION={region}")
        if status in (401, 403, 407):
            raise Refused(f"{where}: {said}; reading it must be allowed; {_permission_hint(code, self._sign is not None)}")
        raise FetchError(f"{where}: {said}; the object itself is needed; check data.root")

    def _changed(self, name: str) -> FetchError:
        return FetchError(
            f"{self.where(name)}: the object changed while it was read; a dataset must stay as its index says; "
            f"start again when its upload is complete"
        )

    def _failure(self, name: str, error: BaseException) -> Exception:
        for cause in _chain(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return FetchError(
                    f"{self.where(name)}: {cause.verify_message}; the server's certificate must be trusted; "
                    f"set REQUESTS_CA_BUNDLE=FILE to the authority's"
                )
        permanent = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.TooManyRedirects)
        if isinstance(error, permanent):
            return FetchError(f"{self.where(name)}: {type(error).__name__}; a plain URL is needed; check data.root")
        return Broken(reason_of(error))


class HttpBody:
    """The body of one answer. See fetch.Body."""

    def __init__(self, response: requests.Response, start: int, total: int | None, stall_s: float) -> None:
        self.start, self.total, self.response, self.stall_s = start, total, response, stall_s
        self.tag: str | None = response.headers.get("ETag") or response.headers.get("Last-Modified")
        self.content_type = response.headers.get("Content-Type", "").split(";")[0].strip().lower()

    def __enter__(self) -> HttpBody:
        return self

    def __exit__(self, *error: object) -> None:
        self.response.close()

    def chunks(self) -> Iterator[bytes]:
        waited, received = 0.0, 0
        while True:
            began = time.monotonic()
            try:
                chunk = self.response.raw.read1(CHUNK)
            except FAILURES as error:
                raise Broken(reason_of(error)) from None
            if not chunk:
                return
            # Time with the server only: a slow disk of ours is not its fault.
            waited, received = waited + time.monotonic() - began, received + len(chunk)
            yield chunk
            if waited > self.stall_s:
                if received < STALL_BYTES:
                    raise Broken(f"{received} bytes in {waited:.0f} s")
                waited, received = 0.0, 0


def _unsigned(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """The signature stands in the URL; a second one from ~/.netrc would be refused."""
    return request


def _range(start: int, stop: int | None) -> dict[str, str]:
    if stop is not None:
        return {"Range": f"bytes={start}-{stop - 1}"}
    return {"Range": f"bytes={start}-"} if start else {}


def _is_etag(tag: str) -> bool:
    return tag.startswith(('"', "W/"))


def _only_if(tag: str | None) -> dict[str, str]:
    """A weak ETag never matches by the standard; the answer's own tag is compared anyway."""
    if not tag or tag.startswith("W/"):
        return {}
    return {"If-Match": tag} if _is_etag(tag) else {"If-Unmodified-Since": tag}


def _span(response: requests.Response) -> tuple[int, int | None]:
    """(first byte, bytes of the whole object) of an answer."""
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if found is None:
            raise Broken("a part without a Content-Range")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server asks us to wait: a number, or a date on the server's own clock."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return min(float(value), MAX_WAIT_S)
    then, now = (email.utils.parsedate_tz(text) for text in (value, response.headers.get("Date", "")))
    if then is None or now is None:
        return 0.0
    return min(max(email.utils.mktime_tz(then) - email.utils.mktime_tz(now), 0.0), MAX_WAIT_S)


def _service_code(response: requests.Response) -> str:
    """S3's name for an error, such as NoSuchKey; empty where there is none."""
    try:
        head = response.raw.read1(2048) or b""
    except FAILURES:
        return ""
    found = re.search(rb"<Code>([A-Za-z]{1,60})</Code>", head)
    return found[1].decode() if found else ""


def _permission_hint(code: str, signed: bool) -> str:
    if code == "RequestTimeTooSkewed":
        return "set this machine's clock"
    if signed:
        return "check the credentials, and that they may also list the bucket: without that a missing object is refused too"
    return "give credentials in ~/.netrc, or a fresh URL where it carries a token"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was made from, and so on."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        cause = waiting.pop(0)
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]


def reason_of(error: BaseException) -> str:
    """Why a request failed, in words without a URL: the system's own where there are any, else the error's name."""
    names = [type(cause).__name__ for cause in _chain(error)]
    texts = [cause.strerror for cause in _chain(error) if isinstance(cause, OSError) and cause.strerror]
    return str(texts[-1]) if texts else names[-1]


__all__ = ["HttpBody", "HttpFetcher", "reason_of"]
