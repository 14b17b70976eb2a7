"""Features in the training loop: the frozen extractor beside the model, on the training device.

Comes in: a ClipBatch of frames, uint8 at native size. Goes out: the same batch with float32 features (B, T, P, E), the numbers
that a build with codec=float32 would have stored for these views.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch
from data_pipeline.build_settings import PROJECTION_NAME
from data_pipeline.config import DataConfig, FeaturesConfig
from data_pipeline.errors import ConfigError, unknown_name
from data_pipeline.features import EXTRACTORS, FRAMES_BEFORE, build_extractor
from data_pipeline.remote.address import is_remote, local_path
from data_pipeline.views import Cut, cut_squares


class OnlineFeatures:
    """Called with a batch of frames on `device`, gives the batch with their features there. Any other batch passes unchanged.

    Raises: ConfigError or DataError when the extractor cannot be built as `config` says.
    """

    def __init__(self, config: DataConfig, device: torch.device) -> None:
        self.device = device
        self.extractor: Any = _build(config, device)
        patch = self.extractor.patch_size
        if config.image_size % patch:
            raise ConfigError(
                f"data.image_size={config.image_size}; {config.features} needs a multiple of its patch size {patch}; "
                f"set data.image_size={max(1, config.image_size // patch) * patch}"
            )
        if self.extractor.layer != config.layer:
            raise ConfigError(f"data.layer={config.layer}; {config.features} has {self.extractor.layer}; change data.layer")
        self.grid = (config.image_size // patch, config.image_size // patch)
        # Clips of one forward; one that looks at neighbouring frames must not look into another clip.
        self._frames_at_once = 0 if FRAMES_BEFORE.get(config.features) else config.online.batch_frames

    @torch.no_grad()
    def __call__(self, batch: ClipBatch) -> ClipBatch:
        if batch.codec != "frames":
            return batch
        frames, length = batch.features, batch.features.shape[1]
        at_once = max(1, self._frames_at_once // length)
        parts = [
            self._take(frames[first : first + at_once], batch.cuts[first : first + at_once])
            for first in range(0, batch.size, at_once)
        ]
        features = torch.cat(parts).unflatten(0, (batch.size, length))[:, batch.frames_before :]
        return replace(batch, features=features.contiguous(), grid=self.grid, codec="float32", cuts=(), frames_before=0)

    def _take(self, frames: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
        """Shapes: uint8 (B, T, H, W, 3) -> float32 (B * T, P, E)."""
        # bf16 is the extractor's own choice: the trainer's autocast must not reach it.
        with torch.autocast(self.device.type, enabled=False):
            squares = torch.cat([cut_squares(clip, cut) for clip, cut in zip(frames, cuts, strict=True)])
            return self.extractor(squares).float()


def _build(config: DataConfig, device: torch.device) -> Any:
    name, online = config.features, config.online
    if name not in EXTRACTORS or name == "none":
        raise unknown_name("data.features", name, [known for known in EXTRACTORS if known != "none"])
    if name == "patch":
        from data_pipeline.features.patch import load_patch

        return load_patch(_projection(config), config.layer)
    precision = online.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    settings = FeaturesConfig(
        name=name, weights=online.weights, layer=config.layer, batch_frames=online.batch_frames, precision=precision
    )
    return build_extractor(settings, device)


def _projection(config: DataConfig) -> Path:
    """Where the extractor that was fitted at the build lies."""
    if config.online.weights is not None:
        path = Path(config.online.weights).expanduser()
        return path / PROJECTION_NAME if path.is_dir() else path
    if is_remote(config.root):
        raise ConfigError(
            f"data.online.weights is not set; features={config.features} were fitted at the build, whose {PROJECTION_NAME} must "
            f"lie on this machine; fetch it, then set data.online.weights=FILE"
        )
    return local_path(config.root) / PROJECTION_NAME


__all__ = ["OnlineFeatures"]
