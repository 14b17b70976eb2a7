"""Schemes: who fetches what lies behind a URL. Part of data_pipeline.remote.

Comes in: the URL of a split. Goes out: its Fetcher. A scheme is a function in FETCHERS; the libraries it needs are imported when
it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import unknown_name
from data_pipeline.remote.fetch import Fetcher


def open_fetcher(root: str, config: RemoteConfig) -> Fetcher:
    """The fetcher for objects below a URL. Raises ConfigError for an unknown scheme."""
    scheme = urlsplit(root).scheme
    if scheme not in FETCHERS:
        raise unknown_name("data.root: scheme", scheme, [*FETCHERS, "file"])
    return FETCHERS[scheme](root, config)


def _http(root: str, config: RemoteConfig) -> Fetcher:
    from data_pipeline.remote.fetch_http import HttpFetcher

    return HttpFetcher(root, config)


def _s3(root: str, config: RemoteConfig) -> Fetcher:
    from data_pipeline.remote.fetch_s3 import s3_fetcher

    return s3_fetcher(root, config)


def _gs(root: str, config: RemoteConfig) -> Fetcher:
    from data_pipeline.remote.fetch_s3 import gs_fetcher

    return gs_fetcher(root, config)


FETCHERS: dict[str, Callable[[str, RemoteConfig], Fetcher]] = {"http": _http, "https": _http, "s3": _s3, "gs": _gs}
