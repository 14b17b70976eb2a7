"""A user's own folder of files: which there are, what each is called, and to which split it belongs.

Comes in: a root. Goes out: files in a fixed order with keys. The split is the folder `train`, `validation` or `val` just below
the root where one of them exists; otherwise a share of the files, chosen by a hash of each file's key, is validation.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_pipeline.errors import DataError

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val")}


def list_files(root: Path, endings: Sequence[str]) -> list[str]:
    """Paths below `root` of files with one of `endings`, sorted; upper case counts, hidden files and folders do not."""
    if not root.is_dir():
        raise DataError(
            f"root={root} is not a folder; it must hold files {', '.join('.' + name for name in endings)}; change root"
        )
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [str(below / name) for name in names if not name.startswith(".") and _ending(name) in endings]
    if not found:
        raise DataError(f"root={root}: no file ends in {', '.join('.' + name for name in endings)}; change root")
    return sorted(found)


def safe_keys(names: Sequence[str]) -> list[str]:
    """Names as sample keys: letters, digits, '_' and '-'. Where two names become one key, each gets a hash of its name."""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", name) for name in names]
    times = Counter(plain)
    numbered = Counter[str]()
    keys = []
    for name, key in zip(names, plain, strict=True):
        if times[key] > 1:
            digest = hashlib.sha256(f"{name}\0{numbered[name]}".encode("utf-8", "surrogateescape")).hexdigest()
            numbered[name] += 1  # a.mp4 and a.mkv are both named a
            key = f"{key}-{digest[:8]}"
        keys.append(key)
    return keys


def split_of(root: Path, split: str, names: Sequence[str], keys: Sequence[str], validation_share: float) -> list[str]:
    """The keys of a split, in the order of the names. Raises DataError for an unknown split and for one without files."""
    if split not in SPLIT_FOLDERS:
        raise DataError(f"split={split!r} is not in {root}; it has {', '.join(SPLIT_FOLDERS)}; change splits")
    tops = {PurePosixPath(name).parts[0] for name in names if len(PurePosixPath(name).parts) > 1}
    if tops & {folder for folders in SPLIT_FOLDERS.values() for folder in folders}:
        chosen = [key for name, key in zip(names, keys, strict=True) if PurePosixPath(name).parts[0] in SPLIT_FOLDERS[split]]
        rule = f"files lie in the folders {', '.join(sorted(tops))}; add {root / split} or change splits"
    else:
        held_out = _held_out(keys, validation_share)
        chosen = [key for key in keys if (key in held_out) == (split == "validation")]
        rule = f"source.validation_share={validation_share} of {len(keys)}; change it or splits"
    if not chosen:
        raise DataError(f"split={split!r} of {root} is empty; at least one file is needed; {rule}")
    return chosen


def _held_out(keys: Sequence[str], share: float) -> set[str]:
    """Keys whose hash falls below the share: a file stays where it is when others come. Of two files, neither split is empty."""
    place = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys}
    held_out = {key for key in keys if place[key] < share}
    if 0 < share < 1 and len(keys) > 1:
        if not held_out:
            held_out = {min(keys, key=place.__getitem__)}
        elif len(held_out) == len(keys):
            held_out.remove(max(keys, key=place.__getitem__))
    return held_out


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()
