"""The run log: `metrics.jsonl`, one JSON object per line, from which console, report and any other reader draw.

Comes in: a step and flat values with path-like keys (`loss/total`, `optim/lr`, `speed/clips_per_s`, `time/step_ms`,
`time/data_wait_ms`, `mem/peak_gib`, `metric/video_fg_ari`, `baseline/k_means/video_fg_ari`). Goes out: lines that hold
"step", "time" (seconds since 1970) and the values. The file survives kills: every line is one write, a line cut short
is dropped when the file is opened again, and a resumed run takes back the lines after the step it resumes from.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.errors import DataError, StorageError
from data_pipeline.files import write_atomically

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RunLog:
    """Append-only writer of one JSON-lines file. Safe to open on what a killed run left behind."""

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        """Open `path`; drop a line cut short, and the lines with a step above `resume_step` where it is given."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.dropped = _repair(self.path, resume_step)
        # Unbuffered and O_APPEND: a line reaches the kernel in one write, so that a kill leaves at most one line cut.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, step: int, values: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Append one line. Numbers may be NumPy scalars or one-element tensors; NaN and infinities become strings.

        Raises StorageError when the disk does not take it; nothing of the line is left in the file.
        """
        line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        for key, value in {**(values or {}), **more}.items():
            if key in ("step", "time"):
                raise ValueError(f"run log key={key!r}; the log itself writes step and time; choose another key")
            line[key] = _plain(value)
        try:
            self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            why = f"a line of {self.path} could not be written: {error.strerror or error}"
            raise StorageError(f"{why}; free space or mend the folder") from error

    def _append(self, line: bytes) -> None:
        written = self._file.write(line)
        if written < len(line):  # a disk that has room for less says so only then; no half line, to which the next would stick
            self._file.truncate(self._file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """Every complete line, oldest first, with "nan" and "inf" as floats again; an absent file is an empty log.

    Raises DataError when a line other than the last one is not JSON: a kill cannot do that.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    raw = path.read_bytes().split(b"\n")
    for number, text in enumerate(raw, start=1):
        parsed = _parse(text)
        if parsed is not None:
            lines.append({key: _special(value) for key, value in parsed.items()})
        elif text.strip() and number < len(raw):
            raise DataError(f"{path}, line {number}: {text[:40]!r} is not a JSON object with a step; delete the line")
    return lines


def series(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of one key in step order. A step that was logged twice counts once: the later line is right."""
    found = {line["step"]: float(line[key]) for line in lines if isinstance(line.get(key), int | float)}
    return sorted(found.items())


def latest(lines: Iterable[Mapping[str, Any]], prefixes: tuple[str, ...]) -> dict[str, float]:
    """The newest number of every key that starts with one of `prefixes`, in the order in which the keys appeared."""
    found: dict[str, float] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(prefixes) and isinstance(value, int | float):
                found[key] = float(value)
    return found


def _repair(path: Path, resume_step: int | None) -> int:
    """Rewrite `path` without damaged and superseded lines, atomically; return how many went. Untouched when none does."""
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for text in path.read_bytes().splitlines(keepends=True):
        parsed = _parse(text)
        complete = parsed is not None and text.endswith(b"\n")
        if complete and (resume_step is None or parsed["step"] <= resume_step):  # type: ignore[index]
            kept.append(text)
        else:
            dropped += 1
    if dropped:
        write_atomically(path, b"".join(kept))
    return dropped


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors; a 0-d one gives a number, others give lists
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _special(value: Any) -> Any:
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def iterate_keys(lines: Iterable[Mapping[str, Any]], prefix: str) -> Iterator[str]:
    """Keys under `prefix` in the order in which they first appear."""
    seen: set[str] = set()
    for line in lines:
        for key in line:
            if key.startswith(prefix) and key not in seen:
                seen.add(key)
                yield key


__all__ = ["RunLog", "iterate_keys", "latest", "read_log", "series"]
