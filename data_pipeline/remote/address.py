"""Addresses of shards: a folder, or a URL. First step of data_pipeline.remote.

Comes in: what the user wrote as data.root. Goes out: paths and URLs below it, and how they may be shown: never with a secret.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from data_pipeline.errors import ConfigError


def is_remote(root: str | Path) -> bool:
    """Whether `root` must be fetched: it has a scheme other than file."""
    return isinstance(root, str) and "://" in root and not root.lower().startswith("file://")


def local_path(root: str | Path) -> Path:
    """The folder that a path or a file:// URL names. Raises ConfigError for a file URL of another machine."""
    if isinstance(root, Path) or not root.lower().startswith("file://"):
        return Path(root)
    parts = urlsplit(root)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{root}: names machine {parts.netloc}; file:// reads this machine only; write file:///FOLDER")
    return Path(unquote(parts.path))


def join(root: str, name: str) -> str:
    """`name` below a URL. A query, such as an access token, stays behind the path."""
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def split_root(root: str | Path, split: str) -> str | Path:
    """Where a split lies below data.root, which may be a path or a URL."""
    return join(root, split) if isinstance(root, str) and is_remote(root) else local_path(root) / split


def shown(root: str | Path) -> str:
    """An address for messages and files: a URL loses its user, password, query and fragment."""
    if not is_remote(root):
        return os.fspath(root)
    parts = urlsplit(str(root))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def without_secrets(text: str) -> str:
    """A text that may be kept: each URL in it as `shown` gives it."""
    return re.sub(r"\w+://[^\s,'\"\]}]+", lambda url: shown(url[0]), text)


__all__ = ["is_remote", "join", "local_path", "shown", "split_root", "without_secrets"]
