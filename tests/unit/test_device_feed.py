"""Batches on their way to the device: none lost, none twice, none before its copy is whole; and how long a step waits."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_shards import data_config, write_split

from data_pipeline.loader import ClipLoader
from data_pipeline.order import World
from data_pipeline.store import ShardDataset
from trainer.device_feed import DeviceFeed
from trainer.step import Clock

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("feed"), frames=((4, 6, 5), (8, 2)), codec="int8").parent


def test_on_a_cpu_batches_pass_as_they_are(root: Path) -> None:
    with ClipLoader(data_config(root), World(), seed=0, global_batch=2) as plain:
        expected = list(itertools.islice(plain, 7))
    with ClipLoader(data_config(root), World(), seed=0, global_batch=2) as loader:
        feed = DeviceFeed(loader, CPU)
        for number, (batch, before) in enumerate(zip(feed, expected, strict=False)):
            assert batch.sample_ids == before.sample_ids and torch.equal(batch.features, before.features)
            assert loader.position == 2 * (number + 1)
            if number + 1 == len(expected):
                break


def test_the_next_batch_can_be_looked_at_without_moving_the_stream(root: Path) -> None:
    with ClipLoader(data_config(root, prefetch_steps=3), World(), seed=0, global_batch=2) as loader:
        assert loader.ready() is None  # nothing was asked for yet
        for number in range(0, 6, 2):
            batch = next(loader)
            while (upcoming := loader.ready()) is None:
                time.sleep(0.001)
            assert loader.ready() is upcoming is not batch and upcoming.step == number + 1
            assert loader.state().position == 2 * (number + 1)
            assert next(loader) is upcoming and loader.position == 2 * (number + 2)


class FakeEvent:
    done = False


class FakeStream:
    """A device on which copies end when somebody waits for them, in order."""

    def __init__(self, device: Any = None) -> None:
        self.copies: list[FakeEvent] = []
        self.waited: list[FakeEvent] = []

    def record_event(self) -> FakeEvent:
        return FakeEvent()

    def wait_event(self, event: FakeEvent) -> None:
        event.done = True
        self.waited.append(event)


class FakeTensor:
    def __init__(self, number: int) -> None:
        self.number, self.users = number, []

    def record_stream(self, stream: FakeStream) -> None:
        self.users.append(stream)


class FakeBatch:
    statistics = None

    def __init__(self, number: int, log: list[str], on_device: bool = False) -> None:
        self.number, self.log, self.on_device = number, log, on_device
        self.features = FakeTensor(number)

    def to(self, device: torch.device) -> FakeBatch:
        self.log.append(f"copy {self.number}")
        return FakeBatch(self.number, self.log, on_device=True)


class FakeLoader:
    """The next batch is ready where `known` says so."""

    def __init__(self, log: list[str], known: list[bool]) -> None:
        self.batches = [FakeBatch(number, log) for number in range(len(known) + 1)]
        self.known, self.log, self.position = known, log, 0

    def ready(self) -> FakeBatch | None:
        if self.position < len(self.known) and self.known[self.position]:
            return self.batches[self.position]
        return None

    def __next__(self) -> FakeBatch:
        self.log.append(f"take {self.position}")
        self.position += 1
        return self.batches[self.position - 1]


def test_on_cuda_the_next_batch_is_copied_while_the_step_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a make-believe device: batch 2 was not read when step 1 began, so it is copied when it is needed."""
    computing = FakeStream()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    log: list[str] = []
    feed = DeviceFeed(FakeLoader(log, [True, True, False, True]), torch.device("cuda"))  # type: ignore[arg-type]
    for number in range(4):
        batch: Any = next(feed)
        log.append(f"step {number}")
        assert batch.on_device and batch.number == number and batch.features.users == [computing]
        assert len(computing.waited) == number + 1
    assert log == [
        *("take 0", "copy 0", "copy 1", "step 0"),
        *("take 1", "step 1"),
        *("take 2", "copy 2", "copy 3", "step 2"),
        *("take 3", "step 3"),
    ]
    assert len({id(event) for event in computing.waited}) == 4


def wait_of(root: Path, monkeypatch: pytest.MonkeyPatch, read_s: float, step_s: float) -> tuple[float, float]:
    """Seconds of eight steps: waited in the feed, and spent elsewhere. One thread makes 16 reads of `read_s`."""
    read_features = ShardDataset.read_features

    def delayed(*arguments: Any) -> None:
        time.sleep(read_s)
        read_features(*arguments)

    with (
        monkeypatch.context() as patched,
        ClipLoader(data_config(root, read_threads=1), World(), seed=0, global_batch=2) as loader,
    ):
        patched.setattr(ShardDataset, "read_features", delayed)
        feed, waited, began = DeviceFeed(loader, CPU), 0.0, time.perf_counter()
        for _ in range(8):
            clock = Clock("data")
            next(feed)
            waited += clock.stop()["data"]
            time.sleep(step_s)
        return waited, time.perf_counter() - began - waited


def test_the_wait_for_data_is_the_readers_delay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slow reader takes beyond the steps' own time is waited for; where reading keeps up, hardly anything is."""
    slow, elsewhere = wait_of(root, monkeypatch, read_s=0.03, step_s=0.0)
    assert slow >= 16 * 0.03 - elsewhere
    quick, _ = wait_of(root, monkeypatch, read_s=0.0, step_s=0.02)
    assert quick < slow / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gpu: needs a CUDA device")
def test_on_a_real_device_every_batch_arrives_whole(root: Path) -> None:
    """While the device is kept busy, so that copies overlap with work and memory is used again."""
    device = torch.device("cuda")
    with ClipLoader(data_config(root), World(), seed=0, global_batch=2) as plain:
        expected = [batch.decoded() for batch in itertools.islice(plain, 30)]
    work = torch.randn(2048, 2048, device=device)
    found = []
    with ClipLoader(data_config(root), World(), seed=0, global_batch=2) as loader:
        for batch in itertools.islice(DeviceFeed(loader, device), 30):
            assert batch.features.device.type == "cuda" and batch.features.dtype == torch.uint8
            for _ in range(20):
                work = torch.nn.functional.normalize(work @ work)
            found.append(batch.decoded())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)
