"""Probe: a model's weights go in, a few losses on fixed features come out, which the same weights give on every machine.

A checkpoint keeps them. Whoever loads it computes them again: bytes may be those that were written and still not mean the
same model, for example when a snapshot was torn, a tensor went to another's name, or the code of the model has changed.
Computed on the host in float64, so that neither device, precision, threads nor ranks matter; no data and no random numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from trainer.config import ModelConfig
from trainer.model.network import VideoSlotModel

TOLERANCE = 1e-5  # relative. Two machines differ by about 1e-12, float32 weights that differ in one bit by what that bit weighs
FRAMES = 2  # the second frame's slots come through the predictor


class Probe:
    """Losses of weights for a model of this configuration. Callable from any thread."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):  # the training loop's random numbers go on undisturbed
            # the decoder's plain path: it serves every model, and a row of patches needs no other
            self._model = VideoSlotModel(replace(config, decoder_path="plain", recompute_frames=0)).to_empty(device="meta")
        y, x = config.grid
        numbers = torch.arange(FRAMES * y * x * config.feature_dim, dtype=torch.float64)
        # what a sine makes of large steps: no two rows alike, the same everywhere
        features = torch.sin(numbers * 12.9898 + seed).reshape(1, FRAMES, y * x, config.feature_dim)
        self._features = features
        self._band = slice(y // 2 * x, (y // 2 + 1) * x)  # decoded patches: one row, to be cheap

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Losses by name. Takes 8 bytes a weight while it runs. Raises ConfigError when the weights are not this model's."""
        require_same_shapes(self._model, weights)
        model = copy.deepcopy(self._model)
        model.load_state_dict({name: value.double() for name, value in weights.items()}, assign=True)
        encoded = model(self._features, lambda _: None)
        reconstruction, object_logits = model.decoder(encoded.slots.flatten(0, 1), band=self._band)
        target = self._features[0][:, self._band]
        found = {
            "feature_reconstruction": (reconstruction - target).square().mean(),
            "slots": encoded.slots.square().mean(),
            "attention": encoded.attn_logits.logsumexp(2).mean(),
            "objects": object_logits.logsumexp(1).mean(),
            "weights": torch.stack([value.square().sum() for value in model.state_dict().values()]).sum(),
        }
        return {name: float(value) for name, value in found.items()}


def require_same_shapes(model: nn.Module, weights: Mapping[str, Tensor], where: str = "") -> None:
    """Raises ConfigError with the first tensor that a model and weights do not have alike; `where`: begin of the message."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here = list(own[name].shape) if name in own else "absent"
        there = list(weights[name].shape) if name in weights else "absent"
        if here != there:
            raise ConfigError(
                f"{where}tensor {name} is {there}, the configured model has {here}; "
                "a run goes on with the model it began with; undo the change to model=..., or choose another name"
            )


def difference(stored: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Which stored loss is not found again; "" when all are. A name that only one side knows does not count."""
    for name in sorted(stored.keys() & now.keys()):
        if not math.isclose(stored[name], now[name], rel_tol=TOLERANCE, abs_tol=1e-12):
            return f"probe loss {name} is {now[name]:.9g}, {stored[name]:.9g} was stored"
    return ""
