"""Loader: batches follow from the position alone, on any world; damage is counted and capped."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import GRID, SIZE, WIDTH, data_config, decoded_features, flip_byte, sample_features, write_split

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import DataError
from data_pipeline.loader import ClipLoader, VideoLoader
from data_pipeline.order import World
from data_pipeline.shard_files import LocalFiles
from data_pipeline.shards import DatasetIndex

FRAMES = [[4, 6, 1], [8, 5], [2, 3, 7]]  # one video is shorter than a clip of 2 frames
SHORT_ID = 2
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path, frames=FRAMES)
    write_split(tmp_path, "validation", frames=FRAMES)
    return tmp_path


def take(loader: ClipLoader, num_steps: int) -> list[ClipBatch]:
    with loader:
        return list(itertools.islice(loader, num_steps))


def real(batch: ClipBatch) -> list[tuple[int, int, bytes]]:
    """What counts: (sample, start, features) of the real clips."""
    clips = zip(batch.sample_ids, batch.starts, batch.features, strict=True)
    return [(sample, start, values.numpy().tobytes()) for sample, start, values in clips][: batch.num_real]


def test_a_batch_holds_what_it_says(root: Path) -> None:
    config = data_config(root, views=["center+hflip"])
    for step, batch in enumerate(take(ClipLoader(config, World(), seed=0, global_batch=3), 9)):
        assert batch.features.shape == (3, 2, GRID[0] * GRID[1], WIDTH) and batch.features.dtype == torch.float16
        assert (batch.grid, batch.num_real, batch.step, batch.epoch) == (GRID, 3, step, step * 3 // 7)
        for key, start, values in zip(batch.keys, batch.starts, batch.features, strict=True):
            whole = sample_features(key, start + 2, "center+hflip")
            frames = sum(FRAMES[int(key[6])][int(key[8]) : int(key[8]) + 1])
            assert start % 2 == 0 and start + 2 <= frames
            expected = sample_features(key, frames, "center+hflip").astype(np.float16)[start : start + 2]
            np.testing.assert_array_equal(values.numpy(), expected)
            assert whole.shape[0] == start + 2


def test_every_eligible_video_once_per_epoch(root: Path) -> None:
    loader = ClipLoader(data_config(root), World(), seed=4, global_batch=7)
    assert (loader.excluded, loader.num_samples, loader.steps_per_epoch) == (1, 7, 1)
    for batch in take(loader, 4):
        assert sorted(batch.sample_ids) == [0, 1, 3, 4, 5, 6, 7]
    assert SHORT_ID not in batch.sample_ids


def test_views_and_chunks_are_all_drawn(root: Path) -> None:
    drawn: dict[str, set[tuple[int, bool]]] = {}
    for batch in take(ClipLoader(data_config(root), World(), seed=1, global_batch=7), 60):
        for key, start, values in zip(batch.keys, batch.starts, batch.features, strict=True):
            frames = FRAMES[int(key[6])][int(key[8])]
            center = sample_features(key, frames, "center").astype(np.float16)[start : start + 2]
            drawn.setdefault(key, set()).add((start, bool(np.array_equal(values.numpy(), center))))
    assert drawn["video-1_0"] == {(start, view) for start in (0, 2, 4, 6) for view in (False, True)}
    assert drawn["video-1_1"] == {(start, view) for start in (0, 2) for view in (False, True)}


@pytest.mark.parametrize("world_size", [2, 3, 5, 7])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_world_gives_the_same_global_batches(root: Path, world_size: int, accumulation: int) -> None:
    """Five clips a step do not divide by any of these; with seven ranks two of them hold only padding."""
    config = data_config(root)
    alone = take(ClipLoader(config, World(), seed=2, global_batch=5), 6)
    ranks = [
        take(ClipLoader(config, World(rank, world_size), seed=2, global_batch=5, accumulation=accumulation), 6)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert [clip for part in parts for clip in real(part)] == real(whole)
        assert len({part.size for part in parts}) == 1 and parts[0].size % accumulation == 0
        for part in parts:
            for row in range(part.num_real, part.size):
                assert torch.equal(part.features[row], part.features[0]) and part.sample_ids[row] == part.sample_ids[0]
    if world_size == 7:
        assert sorted(part.num_real for part in parts) == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resume_in_the_middle_of_an_epoch_continues_the_stream(root: Path, stop: int) -> None:
    config = data_config(root)
    whole = [real(batch) for batch in take(ClipLoader(config, World(), seed=9, global_batch=4), 8)]
    first = ClipLoader(config, World(), seed=9, global_batch=4)
    before = [real(batch) for batch in take(first, stop)]
    state = first.state()
    assert (state.position, state.dataset_version) == (4 * stop, DatasetIndex.load(root / "train").version)
    resumed = ClipLoader(config, World(), seed=9, global_batch=4, position=state.position)
    after = take(resumed, 8 - stop)
    assert before + [real(batch) for batch in after] == whole
    assert after[0].step == stop and after[0].epoch == 4 * stop // 7


def test_threads_and_prefetching_change_nothing(root: Path) -> None:
    plain = take(ClipLoader(data_config(root, read_threads=1, prefetch_steps=1), World(), seed=0, global_batch=4), 6)
    eager = take(ClipLoader(data_config(root, read_threads=4, prefetch_steps=5), World(), seed=0, global_batch=4), 6)
    assert [real(batch) for batch in plain] == [real(batch) for batch in eager]


def test_batches_are_not_overwritten_by_later_ones(root: Path) -> None:
    with ClipLoader(data_config(root), World(), seed=0, global_batch=4) as loader:
        batch = next(loader)
        copy = batch.features.clone()
        for _ in range(6):
            next(loader)
        assert torch.equal(batch.features, copy)


@pytest.mark.parametrize("keep", ["tensor", "row", "array"])
def test_any_view_of_a_batch_keeps_its_memory(root: Path, keep: str) -> None:
    with ClipLoader(data_config(root), World(), seed=0, global_batch=4) as loader:
        next(loader)
        batch = next(loader)
        kept = {"tensor": batch.features, "row": batch.features[3], "array": batch.features[1:].numpy()}[keep]
        copy = torch.as_tensor(kept).clone()
        del batch
        for _ in range(8):
            next(loader)
        assert torch.equal(torch.as_tensor(kept), copy)


def test_memory_of_a_batch_that_nobody_holds_is_used_again(root: Path) -> None:
    with ClipLoader(data_config(root, prefetch_steps=2), World(), seed=0, global_batch=4) as loader:
        places = {next(loader).features.data_ptr() for _ in range(30)}
        assert len(places) <= 5
        held = [next(loader).features for _ in range(9)]
        assert len({features.data_ptr() for features in held}) == 9


@pytest.mark.parametrize("codec", ["int8", "float16", "float32"])
@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_batches_carry_stored_bytes_and_decode_them(tmp_path: Path, codec: str, read: str) -> None:
    write_split(tmp_path, frames=FRAMES, codec=codec, pictures=False)
    config = data_config(tmp_path, codec=codec, read=read, views=["center"])
    for batch in take(ClipLoader(config, World(), seed=0, global_batch=4), 4):
        if codec == "int8":
            assert batch.features.dtype == torch.uint8 and batch.features.shape == (4, 2, (2 + WIDTH) * 6)
        decoded = batch.to(torch.device("cpu")).decoded()
        for key, start, values in zip(batch.keys, batch.starts, decoded, strict=True):
            frames = FRAMES[int(key[6])][int(key[8])]
            np.testing.assert_array_equal(values.numpy(), decoded_features(key, frames, "center", codec)[start : start + 2])
        for part, expected in zip(batch.split(2), decoded.split(2), strict=True):
            assert part.size == 2 and torch.equal(part.decoded(), expected)
            assert (part.statistics is not None) == (codec == "int8")


def test_evaluation_decodes_int8(tmp_path: Path) -> None:
    write_split(tmp_path, "validation", frames=[[3, 4]], codec="int8")
    with VideoLoader(data_config(tmp_path), World()) as loader:
        for batch, frames in zip(loader, (3, 4), strict=True):
            assert batch.features.shape[1] == frames
            np.testing.assert_array_equal(batch.decoded()[0].numpy(), decoded_features(batch.keys[0], frames, "center", "int8"))


def test_another_codec_than_asked_for_is_refused(root: Path) -> None:
    with pytest.raises(
        DataError, match="data.codec=int8, but the shards hold float16; .* build the shards again with codec=int8"
    ):
        ClipLoader(data_config(root, codec="int8"), World(), seed=0, global_batch=2)


@pytest.mark.parametrize("codec", ["int8", "float16"])
def test_only_the_window_of_a_clip_is_read(tmp_path: Path, codec: str) -> None:
    """Clips of 4 of 24 frames: as many bytes are read as are handed out, no more."""
    write_split(tmp_path, frames=[[24] * 3] * 2, codec=codec, pictures=False)
    loader = ClipLoader(data_config(tmp_path, clip_len=4, prefetch_steps=1), World(), seed=0, global_batch=3)
    delivered = sum(batch.features.nbytes for batch in itertools.islice(loader, 7))
    while loader.queue_depth() < 1:  # the eighth is read ahead
        time.sleep(1e-3)
    loader.close()
    assert loader.bytes_read == delivered / 7 * 8


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    """A process of its own: resident memory after 10 epochs and after 30 more."""
    write_split(tmp_path, frames=[[16] * 5] * 8, codec="int8", pictures=False)
    script = """
import sys
from tiny_shards import data_config
from data_pipeline.loader import ClipLoader
from data_pipeline.order import World

def resident():
    return int(open("/proc/self/statm").read().split()[1])

loader = ClipLoader(data_config(sys.argv[1], clip_len=4), World(), seed=0, global_batch=8)
for step in range(40 * loader.steps_per_epoch):
    if step == 10 * loader.steps_per_epoch:
        before = resident()
    next(loader).decoded()
print((resident() - before) / before)
loader.close()
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "unit")]), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) < 0.02


class Watched(LocalFiles):
    """Remembers what it was told to fetch, and what had been read by then."""

    def __init__(self, folder: Path, index: DatasetIndex) -> None:
        super().__init__(folder, index)
        self.told: list[int] = []
        self.read: list[int] = []

    def prefetch(self, shards: Sequence[int]) -> None:
        self.told += shards

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> int:
        assert shard in self.told
        self.read.append(shard)
        return super().read_into(shard, offset, buffer)


@pytest.mark.parametrize("world", [World(), World(1, 2)])
def test_files_hear_of_shards_before_they_are_read_nearest_first(tmp_path: Path, world: World, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.store.LocalFiles", lambda folder, index, read: Watched(folder, index))
    write_split(tmp_path, frames=[[2] * 3] * 12, pictures=False)
    config = data_config(tmp_path, block_shards=2, lanes=2, read_threads=1)
    loader = ClipLoader(config, world, seed=0, global_batch=4)
    steps = loader.steps_per_epoch
    files = loader.dataset.files
    assert isinstance(files, Watched)
    next(loader)
    assert 4 <= len(set(files.told)) == len(files.told) < 12  # some way ahead, not the whole epoch; each once
    for _ in range(steps - 1):
        next(loader)
    loader.close()
    first_read = list(dict.fromkeys(files.read))
    assert list(dict.fromkeys(files.told))[: len(first_read)] == first_read


def test_other_seeds_give_other_batches(root: Path) -> None:
    one, two = (take(ClipLoader(data_config(root), World(), seed=seed, global_batch=7), 3) for seed in (0, 1))
    assert [real(batch) for batch in one] != [real(batch) for batch in two]


def damage(folder: Path, sample_id: int) -> None:
    """Break every frame of every view of a sample."""
    sample = DatasetIndex.load(folder).samples[sample_id]
    for place in sample.members["features"].values():
        for frame in range(sample.frames):
            flip_byte(folder / f"{folder.name}-{sample.shard:06d}.tar", place["data_offset"] + frame * place["frame_bytes"])


@pytest.mark.parametrize(("broken", "substitute"), [(1, 3), (7, 0)])
def test_a_damaged_video_is_replaced_by_the_next_and_counted(root: Path, broken: int, substitute: int) -> None:
    """The next eligible one: video 2 is too short; after the last comes the first."""
    config = data_config(root, max_skip_fraction=0.2)
    sound = take(ClipLoader(config, World(), seed=0, global_batch=7), 2)
    damage(root / "train", broken)
    loader = ClipLoader(config, World(), seed=0, global_batch=7)
    assert loader.skipped == 0
    batches = take(loader, 2)
    for before, after in zip(sound, batches, strict=True):
        assert [substitute if sample == broken else sample for sample in before.sample_ids] == list(after.sample_ids)
    assert loader.skipped == 1
    key = DatasetIndex.load(root / "train").samples[broken].key
    assert "crc32c" in loader.skip_reasons[key]


def test_too_much_damage_stops_the_run(root: Path) -> None:
    damage(root / "train", 1)
    damage(root / "train", 5)
    with (
        ClipLoader(data_config(root, max_skip_fraction=0.2), World(), seed=0, global_batch=7) as loader,
        pytest.raises(
            DataError, match=r"train-00000[02].tar, sample video-.*; 2 of 7 samples are damaged, limit data.max_skip_fraction=0.2"
        ),
    ):
        next(loader)


def test_all_damaged_ends_too(root: Path) -> None:
    for sample_id in (0, 1, 3, 4, 5, 6, 7):
        damage(root / "train", sample_id)
    with (
        ClipLoader(data_config(root, max_skip_fraction=1.0), World(), seed=0, global_batch=3) as loader,
        pytest.raises(DataError, match="7 of 7"),
    ):
        next(loader)


def test_clips_longer_than_every_video_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="none of 8 videos has data.clip_len=9 frames"):
        ClipLoader(data_config(root, clip_len=9), World(), seed=0, global_batch=2)


def test_features_of_another_model_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="data.features=patch, but the shards hold fake"):
        ClipLoader(data_config(root, features="patch"), World(), seed=0, global_batch=2)
    with pytest.raises(DataError, match="data.image_size=14"):
        VideoLoader(data_config(root, image_size=14), World())


def test_a_missing_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/train/index.json: no such file"):
        ClipLoader(data_config(tmp_path / "nowhere"), World(), seed=0, global_batch=2)


def test_close_leaves_no_thread(root: Path) -> None:
    before = set(threading.enumerate())
    loader = ClipLoader(data_config(root, prefetch_steps=4), World(), seed=0, global_batch=4)
    next(loader)
    assert loader.queue_depth() <= 4 and loader.wait_seconds >= 0
    videos = VideoLoader(data_config(root), World())
    next(iter(videos))
    loader.close()
    videos.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("limit", [None, 3, 100])
def test_evaluation_sees_every_video_exactly_once(root: Path, world_size: int, limit: int | None) -> None:
    expected = list(range(8 if limit is None else min(limit, 8)))
    seen: list[int] = []
    lengths = set()
    for rank in range(world_size):
        with VideoLoader(data_config(root, val_limit=limit), World(rank, world_size)) as loader:
            batches = list(loader)
            assert len(batches) == len(loader)
        lengths.add(len(batches))
        seen += [batch.sample_ids[0] for batch in batches if batch.num_real]
        assert all(batch.size == 1 for batch in batches)
    assert sorted(seen) == expected and len(lengths) == 1


def test_evaluation_gives_whole_videos_with_masks(root: Path) -> None:
    with VideoLoader(data_config(root), World()) as loader:
        first, again = list(loader), list(loader)
    assert [batch.keys for batch in first] == [batch.keys for batch in again]
    for batch, frames in zip(first, itertools.chain(*FRAMES), strict=True):
        expected = sample_features(batch.keys[0], frames, "center").astype(np.float16)
        np.testing.assert_array_equal(batch.features[0].numpy(), expected)
        assert batch.frames is not None and batch.frames.shape == (1, frames, *SIZE, 3) and batch.frames.dtype == torch.uint8
        assert batch.instance_ids is not None and batch.instance_ids.shape == (1, frames, *SIZE)
        assert batch.instance_ids.dtype == torch.int64 and batch.instance_ids.max() > 255
    with VideoLoader(data_config(root), World(), with_frames=False) as loader:
        assert next(iter(loader)).frames is None


def test_evaluation_stops_at_damage(root: Path) -> None:
    damage(root / "validation", 3)
    with (
        VideoLoader(data_config(root, max_skip_fraction=0.9), World()) as loader,
        pytest.raises(DataError, match="sample video-1_0"),
    ):
        list(loader)
