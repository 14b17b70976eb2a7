"""The index of a split behind a URL: fetched, verified by its own version, and kept so that it is asked for only once.

A kept index is used without a transfer when the server says that it is still the one, and also when the server does not answer:
a run whose shards are all in the cache starts without a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from pathlib import Path

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import DataError, FetchError
from data_pipeline.files import write_atomically
from data_pipeline.remote.fetch import Fetcher, NotFound, NotModified
from data_pipeline.remote.patience import Patience
from data_pipeline.remote.transfer import small
from data_pipeline.shards import INDEX_NAME, DatasetIndex

ATTEMPTS = 3  # when a kept index can stand in, and for one that comes damaged
logger = logging.getLogger(__name__)


def load_index(fetcher: Fetcher, config: RemoteConfig, kept_in: Path | None) -> DatasetIndex:
    """Raises FetchError when it cannot be had, DataError when it is no index. `kept_in` None: nothing is kept."""
    where = fetcher.where(INDEX_NAME)
    path = None if kept_in is None else kept_in / f"{hashlib.sha256(where.encode()).hexdigest()}.index"
    kept, tag = _read_kept(path, where)
    patience = Patience(config, where, threading.Event(), attempts=None if kept is None else ATTEMPTS)
    try:
        for attempt in range(ATTEMPTS):
            content, new_tag = small(fetcher, INDEX_NAME, patience, lambda **_: None, known=tag)
            try:
                index = _parse(content, where)
                break
            except DataError:
                if attempt + 1 == ATTEMPTS:
                    raise
    except NotModified:
        assert kept is not None
        return kept
    except NotFound:
        raise
    except FetchError as error:
        if kept is None:
            raise
        logger.warning("%s; going on with the index of the last time, version %s", error, kept.version[:12])
        return kept
    if path is not None:
        with contextlib.suppress(OSError):  # a full disk: the next start fetches it again
            write_atomically(path, json.dumps(new_tag).encode() + b"\n" + content)
    return index


def _read_kept(path: Path | None, where: str) -> tuple[DatasetIndex | None, str | None]:
    """(index, tag) of the last time; nothing when there was none or the file is damaged."""
    if path is None or not path.is_file():
        return None, None
    try:
        first, _, content = path.read_bytes().partition(b"\n")
        return _parse(content, where), json.loads(first)
    except (DataError, OSError, ValueError):
        return None, None


def _parse(content: bytes, where: str) -> DatasetIndex:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}; an index must be one whole JSON object; upload it again") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: holds a JSON {type(values).__name__}; an index must be one whole JSON object; upload it again")
    return DatasetIndex.parse(values, where)


__all__ = ["load_index"]
