"""All construction in one place: RunConfig -> model, objective, loaders."""

from __future__ import annotations

import random

import numpy as np
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.loader import ClipLoader, VideoLoader
from data_pipeline.order import World, rank_slice
from data_pipeline.store import ShardDataset
from trainer.config import ModelConfig, RunConfig
from trainer.model.network import VideoSlotModel
from trainer.objective import Objective


def seed_everything(seed: int) -> None:
    """The same initial weights on every rank; the order of samples has generators of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_model(config: ModelConfig, seed: int) -> VideoSlotModel:
    seed_everything(seed)
    return VideoSlotModel(config)


def build_objective(config: RunConfig) -> Objective:
    return Objective(config.objective, config.optim.max_steps)


def build_clip_loader(config: RunConfig, world: World, position: int) -> ClipLoader:
    """Training clips of this rank from stream position `position` on. Raises ConfigError when the shards do not fit the model."""
    loader = ClipLoader(
        config.data,
        world,
        seed=config.seed,
        global_batch=config.optim.global_batch,
        accumulation=config.parallel.accumulation,
        position=position,
    )
    check_features(loader.dataset, config.model)
    return loader


def build_video_loader(config: RunConfig, world: World) -> VideoLoader:
    """Whole validation videos, each exactly once over all ranks."""
    loader = VideoLoader(config.data, world)
    check_features(loader.dataset, config.model)
    return loader


def check_validation(config: RunConfig, world: World, train: ShardDataset) -> None:
    """Before a run begins: its validation shards are there, fit the model, and hold features of the very same extractor."""
    loader = build_video_loader(config, world)
    loader.close()
    validation = loader.dataset
    for name in ("fingerprint", "codec", "resize"):
        here, there = train.index.features[name], validation.index.features[name]
        if here != there:
            raise ConfigError(
                f"{name} of the features is {str(there)[:12]} in {validation.folder}, {str(here)[:12]} in {train.folder}; "
                "both splits need the same; build them with one command"
            )


def check_extractor(dataset: ShardDataset, fingerprint: str) -> None:
    """Weights know the features of one extractor; others of the same width would be read without an error."""
    there = dataset.index.features["fingerprint"]
    if fingerprint and there != fingerprint:
        raise ConfigError(
            f"{dataset.folder} holds features with fingerprint {there[:12]}, the run was trained on {fingerprint[:12]}; "
            "both must come from one extractor; build these shards with the run's weights or projection"
        )


def real_per_rank(config: RunConfig, world: World) -> list[int]:
    """How many clips of each global batch a rank holds."""
    slices = [rank_slice(config.optim.global_batch, World(rank=rank, size=world.size)) for rank in range(world.size)]
    return [stop - start for start, stop in slices]


def check_features(dataset: ShardDataset, model: ModelConfig) -> None:
    """The shards' feature width and grid must be the model's."""
    features, grid = dataset.index.features, list(dataset.index.grid)
    if features["width"] != model.feature_dim:
        raise ConfigError(
            f"model.feature_dim={model.feature_dim}, but {dataset.folder} holds {features['extractor']} features "
            f"of width {features['width']}; set model.feature_dim={features['width']}, or build shards of another extractor"
        )
    if grid != list(model.grid):
        shown = str(grid).replace(" ", "")
        raise ConfigError(
            f"model.grid={list(model.grid)}, but {dataset.folder} holds a patch grid of {grid}; set model.grid={shown}"
        )
