"""Verify: a line for every damage, none for sound shards, an exit code."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_shards import flip_byte, write_split

from data_pipeline import verify
from data_pipeline.shards import DatasetIndex
from data_pipeline.verify import verify_split

DAMAGES = 1000
TAR_BLOCK = 512


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_split(folder, frames=((4, 3), (5,), (2, 2, 2)))
    return folder


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "shards")
    return tmp_path / "shards"


def test_sound_shards_have_no_line(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--quick"], ["--threads", "1"], ["--threads", "7"]):
        assert verify.main([str(sound), *words]) == 0
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 1 and "3 shards" in said.out and not said.err


def test_a_broken_index_hides_no_other_split(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(shards / "train", shards / "validation")
    (shards / "train" / "index.json").write_text("{")
    assert verify.main([str(shards)]) == 1
    broken, sound = capsys.readouterr().out.splitlines()
    assert "train/index.json: " in broken and sound.endswith("sound")


def test_wrong_options_are_named(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        verify.main([str(sound), "--threads", "0"])
    assert ended.value.code == 2 and "--threads=0; at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "parts", "quick"),
    [
        (lambda train: (train / "train-000001.tar").unlink(), ["train-000001.tar: No such file"], True),
        (lambda train: (train / "train-000002.tar").write_bytes(b"cut"), ["train-000002.tar: 3 bytes, the index has"], True),
        (lambda train: flip_byte(train / "train-000000.tar", 600), ["train-000000.tar: ", "crc32c="], False),
        (lambda train: flip_byte(train / "train-000000.tar", 120), ["train-000000.tar: sha256="], False),  # in a header
        (lambda train: (train / "train-000001.json").unlink(), ["train-000001.json: no such file"], True),
        (lambda train: (train / "train-000001.json").write_text("{"), ["train-000001.json: "], True),
        (lambda train: edit(train / "train-000001.json", "sha256", "0"), ["train-000001.json: sha256=0, the index has"], True),
        (lambda train: edit(train / "train-000001.json", "samples", []), ["train-000001.json: lists other samples"], True),
        (lambda train: (train / ".train-000001.tar.7.tmp").touch(), [".train-000001.tar.7.tmp: a temporary file"], True),
        (lambda train: (train / "train-000003.tar").touch(), ["train-000003.tar: the index does not list it"], True),
    ],
)
def test_every_damage_is_one_line(
    shards: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], parts: list[str], quick: bool
) -> None:
    harm(shards / "train")
    assert verify.main([str(shards)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(part in "\n".join(lines[:-1]) for part in parts) and lines[-1].endswith(f"{len(lines) - 1} damaged")
    assert verify.main([str(shards), "--quick"]) == (1 if quick else 0)


def edit(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def test_files_of_other_names_and_shards_of_no_videos_are_no_damage(shards: Path) -> None:
    (shards / "train" / "notes.txt").touch()
    (shards / "train" / "train-000009.json").write_text(json.dumps({"samples": [], "skipped": [{"key": "a", "reason": "b"}]}))
    assert verify.main([str(shards)]) == 0


def test_every_random_damage_of_the_bytes_is_found(sound: Path, tmp_path: Path) -> None:
    """Flips of one bit, cuts anywhere and at the boundary of a member, two shards exchanged; and no line for what is sound."""
    folder = tmp_path / "train"
    shutil.copytree(sound / "train", folder)
    index, draw = DatasetIndex.load(folder), random.Random(4)
    names = [shard["name"] for shard in index.shards]
    original = {name: (folder / name).read_bytes() for name in names}
    missed, false_alarms = [], 0
    for number in range(DAMAGES):
        name, other = draw.sample(names, 2)
        data, kind = original[name], draw.choice(("flip", "cut", "cut at a block", "exchange"))
        at = draw.randrange(len(data))
        if kind == "flip":
            damaged = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        else:
            damaged = original[other] if kind == "exchange" else data[: at if kind == "cut" else at // TAR_BLOCK * TAR_BLOCK]
        (folder / name).write_bytes(damaged)
        lines = list(verify_split(folder, index))
        if not any(name in line for line in lines):
            missed.append((number, kind, name, at))
        false_alarms += sum(name not in line for line in lines)
        (folder / name).write_bytes(data)
    assert missed == [] and false_alarms == 0
    assert list(verify_split(folder, index)) == []
