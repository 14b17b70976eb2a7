"""DINOv2 as an extractor: finds the weights, batches the frames, picks the device."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.config import FeaturesConfig
from data_pipeline.errors import ConfigError, DataError, check_at_least, check_choice
from data_pipeline.features.vit import LAYERS
from data_pipeline.features.weights import fingerprint, load_vit

# ImageNet's statistics of RGB in [0, 1], which DINOv2 was trained with.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

# name -> model id (of Hugging Face, of timm on the same hub)
_HUB_IDS: dict[str, tuple[str, str]] = {
    "dinov2_vits14": ("facebook/dinov2-small", "timm/vit_small_patch14_dinov2.lvd142m"),
    "dinov2_vitb14": ("facebook/dinov2-base", "timm/vit_base_patch14_dinov2.lvd142m"),
    "dinov2_vitl14": ("facebook/dinov2-large", "timm/vit_large_patch14_dinov2.lvd142m"),
    "dinov2_vitg14": ("facebook/dinov2-giant", "timm/vit_giant_patch14_dinov2.lvd142m"),
}
_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")


class Dinov2Extractor:
    """Frozen DINOv2 features of the last block, or its keys; see Extractor for what goes in and out.

    Differs: `precision=bfloat16` changes the features by their rounding, not the fingerprint, which is the weights'.
    """

    needs_fit = False

    def __init__(self, config: FeaturesConfig, device: torch.device | str | None = None) -> None:
        check_choice("features.layer", config.layer, LAYERS)
        check_at_least("features.batch_frames", config.batch_frames, 1)
        self.name = config.name
        self.layer = config.layer
        self.path = find_weights(config.name, config.weights)
        self._model = load_vit(self.path, config.name)
        self.fingerprint = fingerprint(self._model.state_dict())
        self.width = self._model.shape.width
        self.patch_size = self._model.shape.patch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model.to(self.device)
        self._batch_frames = config.batch_frames
        self._autocast = config.precision == "bfloat16"
        self._mean = torch.tensor(_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(_STD, device=self.device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        check_frames(frames, self.patch_size, self.name)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            parts = [self._features(part).to(frames.device) for part in frames.split(self._batch_frames)]
        return torch.cat(parts)

    def _features(self, frames: Tensor) -> Tensor:
        normalised = (frames.to(self.device) - self._mean) / self._std
        return self._model(normalised, self.layer).float()


def check_frames(frames: Tensor, patch_size: int, name: str) -> None:
    """Raise unless `frames` is float32 (T, 3, H, W) with sides that `patch_size` divides."""
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[0] == 0 or frames.dtype != torch.float32:
        raise DataError(f"frames are {frames.dtype}{list(frames.shape)}; float32 [T, 3, H, W] is what {name} takes; convert them")
    height, width = frames.shape[-2:]
    if height % patch_size or width % patch_size or 0 in (height, width):
        near = max(1, round(width / patch_size)) * patch_size
        raise ConfigError(
            f"frames are {height}x{width} pixels, no multiple of the patch size {patch_size} of {name}; "
            f"whole patches are needed; for example source.image_size={near}"
        )


def find_weights(name: str, weights: str | None) -> Path:
    """The weight file: `weights` itself, the one inside that folder, or the one in the user's hub caches.

    Raises: DataError that says where it looked and how to get the file.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        return _inside(path, name) if path.is_dir() else path
    if name not in _HUB_IDS:
        raise DataError(f"features.weights is not set; features={name} takes any DINOv2 file; add features.weights=FILE")
    looked = [hub_checkpoint(name)]
    if looked[0].is_file():
        return looked[0]
    for hub_id in _HUB_IDS[name]:
        folder = _hub_cache() / f"models--{hub_id.replace('/', '--')}"
        for snapshot in _snapshots(folder):
            found = [snapshot / file for file in _FILE_NAMES if (snapshot / file).is_file()]
            if found:
                return found[0]
        looked.append(folder)
    raise DataError(
        f"no weights of {name} in {', '.join(str(path) for path in looked)}; nothing is downloaded at run time; "
        f"on a machine with network run `torch.hub.load('facebookresearch/dinov2', '{name}')` or "
        f"`hf download {_HUB_IDS[name][0]}`, then copy the file here and add features.weights=FILE"
    )


def _inside(folder: Path, name: str) -> Path:
    known = [folder / file for file in (f"{name}_pretrain.pth", *_FILE_NAMES) if (folder / file).is_file()]
    if known:
        return known[0]
    others = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(others) == 1:
        return others[0]
    shown = ", ".join(path.name for path in others[:5]) or "none"
    raise DataError(f"features.weights={folder} is a folder with weight files: {shown}; one is needed; name the file itself")


def hub_checkpoint(name: str) -> Path:
    """Where torch.hub keeps this model's file."""
    home = os.environ.get("TORCH_HOME") or str(_user_cache() / "torch")
    return Path(home).expanduser() / "hub" / "checkpoints" / f"{name}_pretrain.pth"


def _hub_cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME") or str(_user_cache() / "huggingface")
    return Path(home).expanduser() / "hub"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _snapshots(folder: Path) -> list[Path]:
    """Snapshots of a model in the hub cache, the one that `main` points to first."""
    main = folder / "refs" / "main"
    newest = main.read_text().strip() if main.is_file() else ""
    found = folder.glob("snapshots/*")
    return sorted(found, key=lambda path: (path.name != newest, path.name))
