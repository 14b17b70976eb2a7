"""Frozen extractors: frames -> patch features. One table, name -> builder; torch is imported only when one is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from data_pipeline.config import FeaturesConfig, PatchFeatures
from data_pipeline.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, device

    Device = device | str | None


class Extractor(Protocol):
    """Turns the frames of one video into patch features; holds no state that a call changes.

    Shapes: frames float32 (T, 3, H, W), H and W multiples of `patch_size` -> float32 (T, P, E) on the frames' device,
    P row by row, E = `width`. Units: frames are RGB in [0, 1].
    An extractor may look at neighbouring frames (`patch` does), so it is given whole videos, or FRAMES_BEFORE more of a part.
    """

    name: str
    layer: str
    width: int
    patch_size: int

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the numbers that determine the output (weights or projection)."""
        ...

    def __call__(self, frames: Tensor) -> Tensor: ...


@runtime_checkable
class FittedExtractor(Protocol):
    """An extractor with `needs_fit` true: it learns a projection from clips of the dataset once, in closed form."""

    needs_fit: bool

    def fit(self, clips: Iterable[Tensor]) -> None: ...

    def save(self, path: Path) -> None:
        """Write the whole file or nothing. Raises OSError where it cannot be written."""

    def load(self, path: Path) -> None: ...


def _dinov2(config: FeaturesConfig, device: Device = None) -> Extractor:
    from data_pipeline.features.extractors import Dinov2Extractor

    return Dinov2Extractor(config, device)


class NoExtractor:
    """Shards without features: for training on frames, where features are taken in every step."""

    name = layer = fingerprint = "none"
    width, patch_size = 0, 1

    def __call__(self, frames: Tensor) -> Tensor:
        raise ConfigError("features=none takes no features; an extractor is needed here; choose another features")


def _none(config: FeaturesConfig, device: Device = None) -> Extractor:
    return NoExtractor()


def _patch(config: FeaturesConfig, device: Device = None) -> Extractor:
    from data_pipeline.features.patch import PatchExtractor

    if not isinstance(config, PatchFeatures):
        raise ConfigError(f"features=patch with settings of {type(config).__name__}; PatchFeatures is needed; use features=patch")
    return PatchExtractor(config)


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "dinov2": _dinov2,  # any DINOv2 file: its architecture is read from the tensors
    "dinov2_vits14": _dinov2,
    "dinov2_vitb14": _dinov2,
    "dinov2_vitl14": _dinov2,
    "dinov2_vitg14": _dinov2,
    "patch": _patch,
    "none": _none,
}

FRAMES_BEFORE = {"patch": 1}  # frames before a frame that its features look at; 0 for extractors that are not listed

# Dataclasses behind the members of the configuration group `features`.
GROUP_SCHEMAS: dict[str, type] = {"features/features_schema": FeaturesConfig, "features/patch_schema": PatchFeatures}


def build_extractor(config: FeaturesConfig, device: Device = None) -> Extractor:
    """The extractor that `config.name` names, ready to be called (or fitted, where `needs_fit` is true).

    A network computes on `device`; None: cuda where there is one.

    Raises: ConfigError for an unknown name, DataError when its weights are missing, damaged or of another model.
    """
    if config.name not in EXTRACTORS:
        raise unknown_name("features.name", config.name, EXTRACTORS)
    return EXTRACTORS[config.name](config, device)
