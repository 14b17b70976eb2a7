"""The extractor that needs no weights: hand-made statistics of a patch, then slow directions fitted on the dataset.

A clip's frames go in, patch features come out. `describe` is fixed; the projection is fitted once, when shards are built, and
kept beside them like any other extractor's weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from data_pipeline.config import PatchFeatures
from data_pipeline.errors import DataError, check_at_least, check_choice
from data_pipeline.features.extractors import check_frames
from data_pipeline.features.slow import SlowProjection, fit_slow
from data_pipeline.files import write_atomically

NUM_POSITIONS = 6
_MAX_FIT_PATCHES = 4096  # patches of a clip that the fit looks at: bounds its memory for long clips of large frames
_METADATA_KEY = "slotstream_patch"


class PatchExtractor:
    """Slow features of patch statistics and six position channels; see Extractor for what goes in and out.

    `fit` or `load` comes before the first call. A frame's features depend on the frame before it.
    """

    needs_fit = True

    def __init__(self, config: PatchFeatures) -> None:
        check_choice("features.layer", config.layer, ("slow",))
        for key, least in (("patch_size", 2), ("num_components", 1), ("num_random", 0), ("num_fit_clips", 1)):
            check_at_least(f"features.{key}", getattr(config, key), least)
        self.name = config.name
        self.layer = config.layer
        self.patch_size = config.patch_size
        self.width = config.num_components + NUM_POSITIONS
        self._config = config
        self._projection: SlowProjection | None = None
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings and the fitted projection. Raises: DataError before the fit."""
        self._fitted()
        return self._fingerprint

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        projection = self._fitted()
        check_frames(frames, self.patch_size, self.name)
        slow = projection(describe(frames, self.patch_size))
        _, rows, columns, _ = slow.shape
        positions = self._config.position_scale * soft_positions(rows, columns).to(slow.device)
        return torch.cat([slow, positions.expand(len(frames), -1, -1, -1)], dim=-1).flatten(1, 2)

    @torch.no_grad()
    def fit(self, clips: Iterable[Tensor]) -> None:
        """Fit the projection on clips as they would be called on, float32 (T, 3, H, W); sizes may differ."""
        config = self._config
        descriptors = [self._middle(clip) for clip in clips]
        self._adopt(fit_slow(descriptors, config.num_components, config.num_random, config.seed))

    def _middle(self, clip: Tensor) -> Tensor:
        """Descriptors of a run of frames in the middle of the clip, at most _MAX_FIT_PATCHES unless two frames have more."""
        check_frames(clip, self.patch_size, self.name)
        num_patches = (clip.shape[2] // self.patch_size) * (clip.shape[3] // self.patch_size)
        count = min(len(clip), max(2, _MAX_FIT_PATCHES // num_patches))
        start = (len(clip) - count) // 2
        return describe(clip[start : start + count].cpu(), self.patch_size)

    def save(self, path: Path) -> None:
        """Write the projection as safetensors, whole or not at all; the same fit gives the same bytes."""
        projection = self._fitted()
        # One metadata entry: several would be written in an order that changes from run to run.
        note = json.dumps({"settings": self._settings(), "fingerprint": self._fingerprint}, sort_keys=True)
        write_atomically(Path(path), save(projection.tensors(), metadata={_METADATA_KEY: note}))

    def load(self, path: Path) -> None:
        """Read what `save` wrote. Raises: DataError when it is missing, damaged or of other settings."""
        projection, settings, expected = _read_projection(Path(path))
        if settings != self._settings():
            raise DataError(f"{path}: fitted with {settings}, asked for {self._settings()}; they must be equal; change features")
        self._adopt(projection)
        if self._fingerprint != expected:
            self._projection = None
            raise DataError(
                f"{path}: fingerprint {self._fingerprint[:12]}, recorded {expected[:12]}; the file is damaged; "
                f"build the shards again"
            )

    def _adopt(self, projection: SlowProjection) -> None:
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for name, value in sorted(projection.tensors().items()):
            digest.update(f"{name}{list(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        self._projection, self._fingerprint = projection, digest.hexdigest()

    def _fitted(self) -> SlowProjection:
        if self._projection is None:
            raise DataError("features=patch has no projection yet; it is fitted on a dataset; call fit(clips) or load(path)")
        return self._projection

    def _settings(self) -> dict[str, float]:
        names = ("patch_size", "num_components", "num_random", "seed", "position_scale")
        return {name: getattr(self._config, name) for name in names}


def load_patch(path: Path, layer: str = "slow") -> PatchExtractor:
    """The extractor whose projection `save` wrote, with the settings it was fitted with. Raises what `load` raises."""
    extractor = PatchExtractor(PatchFeatures(layer=layer, **_read_projection(path)[1]))
    extractor.load(path)
    return extractor


def _read_projection(path: Path) -> tuple[SlowProjection, dict[str, Any], str]:
    """(projection, settings, fingerprint as recorded)."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; the projection fitted at the build is needed; build the shards first")
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})[_METADATA_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        return SlowProjection(**tensors), dict(note["settings"]), str(note["fingerprint"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no fitted patch projection ({type(error).__name__}: {str(error)[:120]}); the file is damaged or of "
            f"another kind; build the shards again"
        ) from None


def describe(frames: Tensor, patch_size: int) -> Tensor:
    """Statistics of each patch and of the 3 x 3 patches around it.

    Shapes: (T, 3, H, W) -> (T, Y, X, 78): 39 of the patch (mean and deviation of colour 6, colour histogram 27, gradient
    magnitude 1, gradient along four orientations 4, difference to the frame before 1), then their means over the context.
    """
    own = torch.cat([_colour(frames, patch_size), _edges(frames, patch_size), _motion(frames, patch_size)], dim=1)
    context = functional.avg_pool2d(functional.pad(own, (1, 1, 1, 1), mode="replicate"), kernel_size=3, stride=1)
    return torch.cat([own, context], dim=1).permute(0, 2, 3, 1)


def _colour(frames: Tensor, patch_size: int) -> Tensor:
    """Mean and deviation of RGB and the square root of a soft histogram with 3 bins a channel. Shapes: -> (T, 33, Y, X)."""
    num_frames, _, height, width = frames.shape
    rows, columns = height // patch_size, width // patch_size
    pixels = frames.view(num_frames, 3, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5).flatten(4)
    mean = pixels.mean(-1)
    deviation = (pixels - mean[..., None]).square().mean(-1).sqrt()
    # Hats at 0, 1/2 and 1: a pixel's weights sum to one, so its 27 products do too.
    dark, bright = (1 - 2 * pixels).clamp_min(0), (2 * pixels - 1).clamp_min(0)
    hats = torch.stack([dark, 1 - dark - bright, bright], dim=-2)  # (T, Y, X, 3 channels, 3 bins, pixels)
    red, green, blue = hats.flatten(0, 2).unbind(1)
    pairs = (red[:, :, None] * green[:, None, :]).flatten(1, 2)
    histogram = (pairs @ blue.transpose(1, 2) / patch_size**2).view(num_frames, rows, columns, 27)
    return torch.cat([mean, deviation, histogram.clamp_min(0).sqrt()], dim=-1).permute(0, 3, 1, 2)


def _edges(frames: Tensor, patch_size: int) -> Tensor:
    """Magnitude of the grey gradient and its size along 0, 45, 90 and 135 degrees. Shapes: -> (T, 5, Y, X)."""
    padded = functional.pad(frames.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    half = math.sqrt(0.5)
    sizes = [across, half * (across + down), down, half * (across - down)]
    magnitude = (across.square() + down.square()).sqrt()
    return functional.avg_pool2d(torch.cat([magnitude, *(item.abs() for item in sizes)], dim=1), patch_size)


def _motion(frames: Tensor, patch_size: int) -> Tensor:
    """Absolute difference to the frame before; the first frame's is that to the frame after. Shapes: -> (T, 1, Y, X)."""
    if len(frames) == 1:
        return frames.new_zeros(1, 1, frames.shape[2] // patch_size, frames.shape[3] // patch_size)
    change = (frames[1:] - frames[:-1]).abs().mean(1, keepdim=True)
    return functional.avg_pool2d(torch.cat([change[:1], change]), patch_size)


def soft_positions(rows: int, columns: int) -> Tensor:
    """Where a patch is: y, x and their half-period sines and cosines, y and x from -1 to 1.

    Shapes: -> (Y, X, 6).
    """
    y = ((torch.arange(rows) + 0.5) / rows * 2 - 1)[:, None].expand(rows, columns)
    x = ((torch.arange(columns) + 0.5) / columns * 2 - 1)[None, :].expand(rows, columns)
    half_turns = [turn(value * (math.pi / 2)) for value in (y, x) for turn in (torch.sin, torch.cos)]
    return torch.stack([y, x, *half_turns], dim=-1)
