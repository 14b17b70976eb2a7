"""All construction in one place: RunConfig -> model, objective, loaders."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.loader import ClipLoader, VideoLoader
from data_pipeline.online import OnlineFeatures
from data_pipeline.order import World, rank_slice
from data_pipeline.store import ShardDataset
from trainer.config import ModelConfig, RunConfig
from trainer.model.network import VideoSlotModel
from trainer.objective import Objective
from trainer.patches import ALONE, PatchGroup


def seed_everything(seed: int) -> None:
    """The same initial weights on every rank; the order of samples has generators of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_model(config: ModelConfig, seed: int) -> VideoSlotModel:
    seed_everything(seed)
    return VideoSlotModel(config)


def build_objective(config: RunConfig, patches: PatchGroup = ALONE) -> Objective:
    return Objective(config.objective, config.optim.max_steps, patches)


def build_online(config: RunConfig, device: torch.device) -> OnlineFeatures | None:
    """The extractor in the training loop; None where shards hold the features."""
    return OnlineFeatures(config.data, device) if config.data.input == "frames" else None


class Made(NamedTuple):
    """How the features that the model reads are made. `by` begins a sentence about them, `remedy` one that asks for others."""

    by: str
    remedy: str
    extractor: str
    width: int
    grid: list[int]
    fingerprint: str

    @staticmethod
    def of(dataset: ShardDataset, online: OnlineFeatures | None) -> Made:
        if online is None:
            stored, grid = dataset.index.features, list(dataset.index.grid)
            by, remedy = f"{dataset.folder} holds", "build these shards"
            return Made(by, remedy, stored["extractor"], stored["width"], grid, stored["fingerprint"])
        made, by, remedy = online.extractor, "data.input=frames makes", "set data.online.weights to a file"
        return Made(by, remedy, made.name, made.width, list(online.grid), made.fingerprint)


def build_clip_loader(config: RunConfig, world: World, position: int, online: OnlineFeatures | None = None) -> ClipLoader:
    """Training clips of this rank from stream position `position` on. Raises ConfigError when the shards do not fit the model."""
    loader = ClipLoader(
        config.data,
        world,
        seed=config.seed,
        global_batch=config.optim.global_batch,
        accumulation=config.parallel.accumulation,
        position=position,
    )
    check_features(Made.of(loader.dataset, online), config.model)
    return loader


def build_video_loader(config: RunConfig, world: World, online: OnlineFeatures | None = None) -> VideoLoader:
    """Whole validation videos with their features, each exactly once over all ranks."""
    if online is None:
        loader = VideoLoader(config.data, world)
    else:
        loader = VideoLoader(config.data, world, finish=lambda batch: online(batch.to(online.device)))
    check_features(Made.of(loader.dataset, online), config.model)
    return loader


def check_validation(config: RunConfig, world: World, train: ShardDataset, online: OnlineFeatures | None = None) -> None:
    """Before a run begins: its validation shards are there, fit the model, and hold features of the very same extractor."""
    loader = build_video_loader(config, world, online)
    loader.close()
    validation = loader.dataset
    for name in ("fingerprint", "codec", "resize") if online is None else ("resize",):
        here, there = train.index.features[name], validation.index.features[name]
        if here != there:
            raise ConfigError(
                f"{name} of the features is {str(there)[:12]} in {validation.folder}, {str(here)[:12]} in {train.folder}; "
                "both splits need the same; build them with one command"
            )


def check_extractor(made: Made, fingerprint: str) -> None:
    """Weights know the features of one extractor; others of the same width would be read without an error."""
    there = made.fingerprint
    if fingerprint and there != fingerprint:
        raise ConfigError(
            f"{made.by} features with fingerprint {there[:12]}, the run was trained on {fingerprint[:12]}; "
            f"both must come from one extractor; {made.remedy} with the run's weights or projection"
        )


def real_per_rank(config: RunConfig, world: World) -> list[int]:
    """How many clips of each global batch a rank holds, or a group of ranks that share them."""
    slices = [rank_slice(config.optim.global_batch, World(rank=rank, size=world.size)) for rank in range(world.size)]
    return [stop - start for start, stop in slices]


def check_features(made: Made, model: ModelConfig) -> None:
    """The features' width and grid must be the model's."""
    if made.width != model.feature_dim:
        raise ConfigError(
            f"model.feature_dim={model.feature_dim}, but {made.by} {made.extractor} features "
            f"of width {made.width}; set model.feature_dim={made.width}, or use another extractor"
        )
    if made.grid != list(model.grid):
        shown = str(made.grid).replace(" ", "")
        raise ConfigError(f"model.grid={list(model.grid)}, but {made.by} a patch grid of {made.grid}; set model.grid={shown}")
