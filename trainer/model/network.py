"""VideoSlotModel: patch features of a clip come in, ModelOutput goes out. The whole network of SlotContrast and SSync."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from trainer.config import ModelConfig
from trainer.model.decoder import MLPDecoder
from trainer.model.outputs import ModelOutput
from trainer.model.recurrence import LearnedQueries, Predictor, SlotRecurrence
from trainer.model.slot_attention import SlotAttention
from trainer.precision import at_least_float32, full_precision


class FeatureTransform(nn.Module):
    """Backbone features to slot width: W2 relu(W1 LayerNorm(x) + b1) + b2, hidden width 2 E."""

    def __init__(self, feature_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.expand = nn.Linear(feature_dim, 2 * feature_dim)
        self.contract = nn.Linear(2 * feature_dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.contract(self.expand(self.norm(features)).relu())


class VideoSlotModel(nn.Module):
    """Slots of a clip, frame by frame, and what they say about every patch.

    Under bf16 autocast the two wide MLPs (feature transform, decoder) run in bf16; slot attention and predictor, about a
    hundredth of the arithmetic, run in float32, and so do all logits' softmaxes.
    Source: SlotContrast, released code; official_names.py says which tensor is which.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, grid = config.slot_dim, (config.grid[0], config.grid[1])
        self.grid = grid
        self.feature_dim = config.feature_dim
        self.eval_decode_frames = config.eval_decode_frames
        self.transform = FeatureTransform(config.feature_dim, dim)
        self.initializer = LearnedQueries(config.num_slots, dim)
        self.recurrence = SlotRecurrence(
            SlotAttention(dim, config.gru_hidden, config.query_key_gain),
            Predictor(dim, config.predictor_heads, config.attention_scale),
            config.iters_first,
            config.iters_next,
        )
        self.decoder = MLPDecoder(dim, config.feature_dim, config.decoder_hidden, grid, config.decoder_positions)

    def forward(self, features: Tensor, decode_frames: int | None = None) -> ModelOutput:
        """Shapes: features (B, T, P, E). `decode_frames`: frames decoded at once; None: all.

        Raises ConfigError if P or E are not what the model was built for.
        """
        features = at_least_float32(features)
        self._check(features)
        mapped = self.transform(features)
        with full_precision(features):
            slots, attn_logits = self.recurrence(self.initializer(features.shape[0]), at_least_float32(mapped))
        reconstruction, object_logits = self._decode(slots.flatten(0, 1), decode_frames)
        return ModelOutput(
            slots=slots,
            attn_logits=attn_logits,
            object_logits=object_logits.unflatten(0, slots.shape[:2]),
            reconstruction=reconstruction.unflatten(0, slots.shape[:2]),
            target=features.detach(),
            grid=self.grid,
        )

    @torch.no_grad()
    def segment(self, features: Tensor, chunk: int | None = None) -> ModelOutput:
        """The same for whole videos in evaluation: no gradient, `chunk` frames decoded at once (None: as configured)."""
        return self(features, decode_frames=self.eval_decode_frames if chunk is None else chunk)

    def _decode(self, slots: Tensor, decode_frames: int | None) -> tuple[Tensor, Tensor]:
        if decode_frames is None or slots.shape[0] <= decode_frames:
            return self.decoder(slots)
        parts = [self.decoder(part) for part in slots.split(decode_frames)]
        reconstructions, logits = zip(*parts, strict=True)
        return torch.cat(reconstructions), torch.cat(logits)

    def _check(self, features: Tensor) -> None:
        num_patches = self.grid[0] * self.grid[1]
        if features.ndim != 4 or features.shape[2:] != (num_patches, self.feature_dim):
            raise ConfigError(
                f"features have shape {tuple(features.shape)}; the model was built for (B, T, {num_patches}, {self.feature_dim})"
                "; set model.grid and model.feature_dim to what the shards hold"
            )
