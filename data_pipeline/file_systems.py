"""Which way to read files of a folder. Part of data_pipeline.shard_files.

Comes in: a folder. Goes out: whether it lies on a file system of this machine, where a memory map is safe.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

# Elsewhere a map may fault when the server is away or the file was cut by another machine, and a fault ends the process.
LOCAL_TYPES = {
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "reiserfs", "jfs", "tmpfs", "ramfs", "overlay",
    "squashfs", "erofs", "iso9660", "vfat", "exfat",
}  # fmt: skip


def file_system(folder: str | Path, mounts: Path = MOUNTS) -> str | None:
    """Type of the file system that `folder` lies on; None where the system does not say."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    place = os.path.realpath(folder)
    found: tuple[int, str] | None = None
    for line in lines:
        # Fields: id, parent, device, root, mount point, options, any number of tags, "-", type, ...
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        point = _unescaped(fields[4])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and (found is None or len(point) >= found[0]):  # of two on one point the later lies on top
            found = len(point), fields[fields.index("-", 6) + 1]
    return None if found is None else found[1]


def is_local(folder: str | Path) -> bool:
    """True only for file systems known to be this machine's own."""
    return file_system(folder) in LOCAL_TYPES


def _unescaped(text: str) -> str:
    """Blanks and the like stand as octal numbers: `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


__all__ = ["file_system", "is_local"]
