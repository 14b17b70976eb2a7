"""A build's size: said before it starts, refused when it cannot fit, and a disk that fills up leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_build import FakeExtractor, FakeSource, config_for, contents, fake_extractor, fake_source

from data_pipeline import build as build_module
from data_pipeline.build import build, dry_run
from data_pipeline.errors import DataError

source = pytest.fixture(fake_source, name="source")
extractor = pytest.fixture(fake_extractor, name="extractor")


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))  # type: ignore[attr-defined]


def announced(text: str) -> int:
    """Bytes that the build says it will take."""
    number, unit = re.search(r"about ([\d.]+) (B|kB|MB) in all", text).groups()  # type: ignore[union-attr]
    return int(float(number) * {"B": 1, "kB": 1000, "MB": 1_000_000}[unit])


@pytest.mark.parametrize("changes", [{}, {"codec": "float16", "frames": "none"}, {"frames": "jpeg", "codec": "float32"}])
def test_a_dry_run_says_about_how_much_and_writes_nothing(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    config = config_for(tmp_path / "new" / "out", **changes)
    dry_run(config)
    text = capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert "train: 7 videos of about 3 frames, views center, crop0+hflip, 2 x 2 patches x 3" in text and "in 3 shards" in text
    assert "validation: 3 videos" in text and "free for" in text
    build(config)
    written = sum(path.stat().st_size for path in (tmp_path / "new").rglob("*.tar"))
    assert 0.5 * written < announced(text) < 1.5 * written


def test_what_cannot_fit_is_refused_before_anything_is_built(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, 1000)
    with pytest.raises(DataError, match=r"1.0 kB free, about .* kB needed; .*check_space=false"):
        build(config_for(tmp_path))
    with pytest.raises(DataError, match="1.0 kB free"):
        dry_run(config_for(tmp_path))
    assert set(contents(tmp_path)) <= {"settings.json"}
    build(config_for(tmp_path, check_space=False))
    leave_free(monkeypatch, 0)
    build(config_for(tmp_path))  # all is there already


def test_a_disk_that_fills_up_costs_one_shard_and_is_said_in_one_line(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(config_for(tmp_path / "whole"))
    sync = os.fsync

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "train-000001.tar" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="train-000001.tar: No space left on device; the shard was dropped") as caught:
        build(config_for(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    names = {Path(name).name for name in contents(tmp_path / "out")}
    assert "train-000000.tar" in names and not {"train-000001.tar", "index.json"} & names
    assert not [name for name in names if "tmp" in name]
    monkeypatch.setattr(os, "fsync", sync)
    build(config_for(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = ["source=synthetic", "features=patch", "source.num_train=1", "source.num_validation=1", "source.image_size=16"]
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        assert build_module.run_command(build_module.main, [*words, f"out={out}"]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"error: out={out}: ") and len(said.splitlines()) == 1
