"""What is in the shards: counts and histograms that add up, a sheet that shows what is there, damaged shards named."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import inspect
from data_pipeline.compose import run_command
from data_pipeline.contact_sheet import CAPTION, FAULT, GAP, MARGIN, draw_sheet, evenly, fit_colours, id_colours, overlay
from data_pipeline.inspect import bars, describe, histogram, ranked
from data_pipeline.shards import DatasetIndex, decode_image
from data_pipeline.store import ShardDataset
from tests.unit.tiny_shards import flip_byte, write_split

TILE = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_split(tmp_path, frames=((4, 6), (8,)))


def change(folder: Path, **members: None) -> ShardDataset:
    """The split as if it had been built without frames, without ids or without both."""
    index = DatasetIndex.load(folder)
    for sample in index.samples:
        sample.members.update(members)  # type: ignore[attr-defined]
    return ShardDataset(folder, index)


def tile_at(pixels: np.ndarray, row: int, line: int, column: int, lines: int = 2) -> np.ndarray:
    top = CAPTION + row * (CAPTION + lines * (TILE + GAP)) + CAPTION + line * (TILE + GAP)
    left = MARGIN + column * (TILE + GAP)
    return pixels[top : top + TILE, left : left + TILE]


def crossed(tile: np.ndarray) -> bool:
    return bool((tile[np.arange(TILE), np.arange(TILE)] == FAULT).all(axis=-1)[TILE // 2 :].all())


# --- words ---


def test_a_split_is_described_and_drawn(folder, tmp_path, capsys):
    sheets = tmp_path / "sheets"
    options = ["--out", str(sheets), "--videos", "2", "--frames", "3", "--tile", str(TILE)]
    assert run_command(inspect.main, [str(folder.parent), *options]) == 0
    text = capsys.readouterr().out
    for words in ("3, 0 skipped, frames 4 to 8, 18 in all", "2x3 patches x 5", "native size     9x7 3 ####", "3 of 3 annotated"):
        assert words in text
    assert "frames a video  4 1 ####" in text and "in 2 shards" in text
    sheet = decode_image((sheets / "train.png").read_bytes())
    assert sheet.shape == (2 * CAPTION + 2 * (CAPTION + 2 * (TILE + GAP)), 2 * MARGIN + 3 * (TILE + GAP) - GAP, 3)
    before = (sheets / "train.png").read_bytes()
    assert run_command(inspect.main, [str(folder), *options]) == 0
    assert (sheets / "train.png").read_bytes() == before


def test_no_sheet_where_none_is_wanted_and_wrong_options_are_named(folder, capsys):
    assert run_command(inspect.main, [str(folder), "--videos", "0"]) == 0
    assert not (folder / "contact_sheet.png").exists() and "contact sheet" not in capsys.readouterr().out
    for option in (["--frames", "0"], ["--videos", "-1"], ["--tile", "3"]):
        with pytest.raises(SystemExit):
            inspect.main([str(folder), *option])
        assert f"{option[0]}={option[1]}; at least" in capsys.readouterr().err


def test_what_storing_cost_is_told_where_it_was_measured(folder):
    index = DatasetIndex.load(folder)
    assert "codec           float16, error not measured" in "\n".join(describe("x", index))
    quality = {"err_std": 0.0062, "cosine_loss": 1.5e-5, "nearest_neighbour": 0.987, "bytes_vs_float16": 0.503}
    index.features["quality"] = quality  # type: ignore[index]
    wanted = (
        "error 0.0062 of a channel's deviation, 1 - cosine 1.5e-05, 98.7% of nearest neighbours kept, 0.503 of float16's bytes"
    )
    assert wanted in "\n".join(describe("x", index))


def test_skipped_videos_are_listed_up_to_a_point(folder):
    index = DatasetIndex.load(folder)
    index.skipped.extend({"key": f"k{number}", "reason": "cut"} for number in range(12))
    text = "\n".join(describe("x", index))
    assert "k9: cut" in text and "k10: cut" not in text and "and 2 more" in text


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_a_histogram_holds_every_value_once(values):
    rows = histogram(values)
    assert 1 <= len(rows) <= 10
    for label, count in rows:
        first, _, last = label.partition("-")
        assert count == sum(int(first) <= value <= int(last or first) for value in values)
    assert sum(count for _, count in rows) == len(values)
    for (_, count), bar in zip(rows, bars(rows), strict=True):
        assert (bar.count("#") > 0) == (count > 0) and bar.count("#") <= 40


@given(st.lists(st.sampled_from([f"{side}x1" for side in range(20)]), min_size=1))
def test_rarer_sizes_share_a_row(sizes):
    rows = ranked(Counter(sizes))
    assert sum(count for _, count in rows) == len(sizes) and len(rows) <= 10
    counts = [count for label, count in rows if "other" not in label]
    assert counts == sorted(counts, reverse=True)


# --- the sheet ---


def test_objects_are_tinted_and_outlined():
    ids = np.zeros((6, 7), np.uint8)
    ids[1:5, 1:6] = 3
    black = np.zeros((6, 7, 3), np.uint8)
    drawn = overlay(black, ids)
    colour = id_colours(np.array([3]))[0]
    border = ids > 0
    border[2:4, 2:5] = False
    assert (drawn[border] == colour).all() and not drawn[ids == 0].any()
    inner = drawn[2:4, 2:5].reshape(-1, 3)
    assert (inner <= colour // 2).all() and inner.any()


def test_neighbouring_ids_have_colours_that_differ():
    colours = id_colours(np.arange(1, 13)).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1)[np.triu_indices(12, 1)]
    assert apart.min() > 40


def test_features_of_two_kinds_get_two_colours(tmp_path):
    """Half of the patches of every frame point one way, half the other: the first component tells them apart."""
    folder = write_split(tmp_path, frames=((4, 4, 4),))
    dataset = ShardDataset(folder, DatasetIndex.load(folder))
    direction = np.array([0.0, 3.0, -1.0, 0.5, 2.0])

    def features(number: int, view: str, start: int, count: int) -> np.ndarray:
        noise = np.random.default_rng(number * 10 + start).normal(scale=0.01, size=(count, 6, 5))
        return (noise + 7 * number + np.where(np.arange(6) < 3, 1.0, -1.0)[:, None] * direction).astype(np.float32)

    dataset.features = features  # type: ignore[method-assign]
    colours = fit_colours(dataset, [])
    assert colours is not None and colours.explained > 0.9
    assert colours.directions[:, 0][np.abs(colours.directions[:, 0]).argmax()] > 0
    values = features(1, "center", 0, 1)[0]
    painted = colours.paint(values, values.mean(axis=0))[:, 0].astype(int)
    assert painted[:3].min() - painted[3:].max() > 150 or painted[3:].min() - painted[:3].max() > 150


def test_a_channel_that_never_moves_and_a_single_patch_do_no_harm(tmp_path):
    folder = write_split(tmp_path, frames=((1,),))
    dataset = ShardDataset(folder, DatasetIndex.load(folder))
    dataset.features = lambda *_: np.full((1, 6, 5), 4.0, np.float32)  # type: ignore[method-assign]
    sheet = draw_sheet(dataset, 3, 3, TILE)
    assert sheet.faults == [] and np.isfinite(sheet.explained or 0.0)


@pytest.mark.parametrize("absent", [{"frames": None}, {"ids": None}, {"frames": None, "ids": None}])
def test_builds_without_frames_or_ids_are_drawn(folder, absent):
    sheet = draw_sheet(change(folder, **absent), 2, 3, TILE)
    lines = 1 if len(absent) == 2 else 2
    assert sheet.pixels.shape[0] == 2 * CAPTION + 2 * (CAPTION + lines * (TILE + GAP)) and not sheet.faults
    assert not crossed(tile_at(sheet.pixels, 0, lines - 1, 0, lines))
    assert len(np.unique(tile_at(sheet.pixels, 0, lines - 1, 0, lines).reshape(-1, 3), axis=0)) > 3  # the features


def test_features_can_be_left_out(folder):
    sheet = draw_sheet(change(folder), 1, 2, TILE, with_features=False)
    assert sheet.pixels.shape[0] == 2 * CAPTION + CAPTION + TILE + GAP and sheet.explained is None


@given(total=st.integers(1, 500), wanted=st.integers(1, 40))
def test_evenly_chosen_numbers_reach_both_ends(total, wanted):
    chosen = evenly(total, wanted)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(total, wanted) and chosen[0] >= 0 and chosen[-1] < total
    if min(total, wanted) > 1:
        assert chosen[0] == 0 and chosen[-1] == total - 1


# --- damage ---


def test_a_missing_and_a_cut_shard_are_named_and_the_others_shown(tmp_path, capsys):
    folder = write_split(tmp_path, frames=((4,), (4,), (4,)))
    (folder / "train-000001.tar").unlink()
    cut = folder / "train-000002.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    assert run_command(inspect.main, [str(folder), "--tile", str(TILE)]) == 1
    printed = capsys.readouterr()
    assert "3, 0 skipped" in printed.out
    lines = [line for line in printed.err.splitlines() if line.startswith("damaged: ")]
    assert len(lines) == 2 and "train-000001.tar: no such file" in lines[0] and "train-000002.tar: 700 bytes" in lines[1]
    sheet = decode_image((folder / "contact_sheet.png").read_bytes())
    assert [crossed(tile_at(sheet, row, 1, 3)) for row in range(3)] == [False, True, True]


def test_flipped_bytes_cross_a_tile_out(folder, capsys):
    place = DatasetIndex.load(folder).samples[0].members["frames"]
    flip_byte(folder / "train-000000.tar", place["offset"][0] + place["length"][0] // 2)
    assert run_command(inspect.main, [str(folder), "--tile", str(TILE)]) == 1
    assert "video-0_0, frames 0: crc32c=" in capsys.readouterr().err
    sheet = decode_image((folder / "contact_sheet.png").read_bytes())
    assert crossed(tile_at(sheet, 0, 0, 0)) and not crossed(tile_at(sheet, 0, 0, 1)) and not crossed(tile_at(sheet, 0, 1, 0))


def test_a_place_that_takes_no_sheet_is_named(folder, capsys):
    (folder / "file").touch()
    assert run_command(inspect.main, [str(folder), "--out", str(folder / "file")]) == 2
    assert "file/train.png: File exists; the sheet needs a place; give --out=FOLDER" in capsys.readouterr().err


def test_a_broken_index_hides_no_other_split(folder, capsys):
    other = folder.parent / "validation"
    shutil.copytree(folder, other)
    (folder / "index.json").write_text("{")
    assert run_command(inspect.main, [str(folder.parent), "--videos", "0"]) == 1
    printed = capsys.readouterr()
    assert "train\n  unreadable" in printed.out and "3, 0 skipped" in printed.out
    assert "train/index.json" in printed.err
