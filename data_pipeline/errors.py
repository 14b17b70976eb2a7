"""Errors that a user can mend, each one line: what is wrong = value; the rule; where; what to do."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting is wrong. The message names the key, the value, the rule and the remedy."""


class DataError(ValueError):
    """A file or a sample is missing, damaged or of another kind than the settings say."""


class FetchError(DataError):
    """An object behind a URL cannot be had, or not as the index describes it. No sample is skipped for that: the run stops."""


class StateError(RuntimeError):
    """The world or a run's state is not what it must be: a damaged checkpoint, a full disk, a loss that is not finite."""


class StorageError(StateError):
    """A disk refuses what must be kept. Somebody else may mend that: started again later, the run may go on (exit code 74)."""


def unknown_name(what: str, value: str, known: Iterable[str], remedy: str = "") -> ConfigError:
    """An error for a name that no table knows; lists the known names, the nearest first."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
    ordered = near + [name for name in names if name not in near]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{what}={value!r} is not known; choose one of {', '.join(ordered)}{hint}{remedy and ' ' + remedy}")


def unknown_key(what: str, key: str, split: str, root: object) -> DataError:
    """An error for a key that a source's split does not have. `what` is one of the things that keys name: video, picture."""
    return DataError(f"{what} key={key!r}; split {split} of {root} has no such {what}; take keys from keys({split!r})")


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `known`."""
    known = list(known)
    if value not in known:
        raise unknown_name(key, value, known)


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise ConfigError unless `value` >= `least`."""
    if not least <= value < float("inf"):
        raise ConfigError(f"{key}={value}; it must be at least {least} and finite; change {key}")


def check_distinct(key: str, values: list[str]) -> None:
    """Raise ConfigError unless there are values, each once."""
    if not values or len(set(values)) != len(values):
        shown = str(values).replace("'", "").replace(" ", "")
        raise ConfigError(f"{key}={shown}; at least one is needed, each once; change {key}")


def check_share(key: str, value: float) -> None:
    """Raise ConfigError unless `value` is a share in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{key}={value}; a share in [0, 1] is needed; change {key}")


def check_path(key: str, value: str | None) -> None:
    """Raise ConfigError for an empty path, which would mean the current folder."""
    if value is not None and not value.strip():
        raise ConfigError(f"{key} is empty; a path is needed; give {key}=FOLDER")


def say_error(text: str) -> None:
    """Print on stderr. Where that cannot be written, on a full disk for example, the work goes on, or the exit code says it."""
    with contextlib.suppress(OSError):
        print(text.rstrip(), file=sys.stderr, flush=True)
