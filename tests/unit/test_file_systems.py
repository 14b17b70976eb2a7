"""Which file system a folder lies on, from the kernel's table of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.file_systems import file_system, is_local
from data_pipeline.shard_files import LocalFiles

TABLE = """\
22 1 254:0 / {root} rw,relatime - ext4 /dev/vda rw
31 22 0:40 / {root}/far rw,relatime shared:5 master:2 - nfs4 server:/export rw
32 22 0:41 / {root}/with\\040blank rw - lustre server:/fs rw
33 31 0:42 / {root}/far/scratch rw - tmpfs none rw
34 22 0:43 / {root}/twice rw - ext4 /dev/vdb rw
35 22 0:44 / {root}/twice rw - fuse.sshfs host: rw
36 22 0:45 broken line
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE.replace("{root}", str(tmp_path)))
    return table


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("", "ext4"),
        ("farther", "ext4"),
        ("far/a/b", "nfs4"),
        ("far/scratch", "tmpfs"),
        ("with blank", "lustre"),
        ("twice/a", "fuse.sshfs"),
    ],
)
def test_the_innermost_and_latest_mount_counts(tmp_path: Path, mounts: Path, folder: str, expected: str) -> None:
    assert file_system(tmp_path / folder, mounts) == expected


def test_links_are_followed(tmp_path: Path, mounts: Path) -> None:
    (tmp_path / "near").symlink_to(tmp_path / "far")
    assert file_system(tmp_path / "near", mounts) == "nfs4"


def test_unknown_is_not_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_system(tmp_path, tmp_path / "nowhere") is None
    for kind, local in (("ext4", True), ("xfs", True), ("nfs4", False), ("fuse.sshfs", False), (None, False)):
        monkeypatch.setattr("data_pipeline.file_systems.file_system", lambda folder, kind=kind: kind)
        assert is_local(tmp_path) is local
        assert LocalFiles(tmp_path, None, "auto").mapped is local  # type: ignore[arg-type]
    assert LocalFiles(tmp_path, None, "mmap").mapped and not LocalFiles(tmp_path, None, "pread").mapped  # type: ignore[arg-type]
