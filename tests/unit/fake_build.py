"""What tests of the build share: a source and an extractor made here, and a configuration for them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.clip import Clip
from data_pipeline.config import BuildConfig, FeaturesConfig, SourceConfig
from data_pipeline.errors import DataError

WIDTH, PATCH = 3, 4
LOOKED_AT = 6  # videos that a build of both splits reads for its estimate


class FakeSource:
    """Seven training and three validation videos of different lengths; those in `broken` cannot be read."""

    background_labelled = False

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.repeated: list[str] = []
        self.reads: list[tuple[str, str]] = []

    def keys(self, split: str) -> list[str]:
        return [f"{split}_{number}" for number in range({"train": 7, "validation": 3, "empty": 0}[split])] + self.repeated

    def read(self, split: str, key: str) -> Clip:
        self.reads.append((split, key))
        if key in self.broken:
            raise DataError(f"{key}.jpg: cut off")
        number = int(key.split("_")[1])
        random = np.random.default_rng(number)
        frames = random.integers(0, 256, (2 + number % 3, 10, 14, 3), dtype=np.uint8)
        ids = random.integers(0, 3, frames.shape[:3]).astype(np.uint8) if split == "validation" else None
        return Clip(key=key, frames=frames, instance_ids=ids, metadata={"number": number})


class FakeExtractor:
    """Mean colour of each patch, times `gain`."""

    name, layer, width, patch_size, needs_fit = "mean", "pixels", WIDTH, PATCH, False

    def __init__(self) -> None:
        self.gain = 1.0
        self.fits = 0

    @property
    def fingerprint(self) -> str:
        return f"{self.gain:.6f}"

    def __call__(self, frames: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(frames, PATCH)
        return pooled.flatten(2).transpose(1, 2) * self.gain

    def fit(self, clips: Iterable[Tensor]) -> None:
        self.fits += 1
        self.gain = float(np.mean([float(clip.mean()) for clip in clips]))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.gain))

    def load(self, path: Path) -> None:
        self.gain = json.loads(path.read_text())


def fake_source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    """A fixture: builds read this source."""
    fake = FakeSource()
    monkeypatch.setattr("data_pipeline.sources.build_source", lambda config, root: fake)
    return fake


def fake_extractor(monkeypatch: pytest.MonkeyPatch) -> FakeExtractor:
    """A fixture: builds take their features from this extractor."""
    fake = FakeExtractor()
    monkeypatch.setattr("data_pipeline.features.build_extractor", lambda config: fake)
    return fake


def config_for(out: Path, **changes: Any) -> BuildConfig:
    values: dict[str, Any] = {
        "source": SourceConfig(name="fake", image_size=8, train_views=["center", "crop0+hflip"], resize="crop"),
        "features": FeaturesConfig(name="mean"),
        "out": str(out),
        "samples_per_shard": 3,
        "workers": 1,
        "frames": "png",
    }
    return BuildConfig(**(values | changes))


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a reader sees, by its path."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".build.lock"
    }
