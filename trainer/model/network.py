"""VideoSlotModel: patch features of a clip come in, ModelOutput goes out. The whole network of SlotContrast and SSync."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.errors import ConfigError
from trainer.config import ModelConfig
from trainer.model.decoder import MLPDecoder
from trainer.model.outputs import Encoded, ModelOutput, OnePassOutput, TaskOf
from trainer.model.projector import Projector
from trainer.model.recurrence import LearnedQueries, Predictor, SlotRecurrence
from trainer.model.slot_attention import SlotAttention
from trainer.patches import ALONE, PatchGroup
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

    With `patches` set to a group of ranks, `forward` reads and speaks of this rank's band of patches; `segment` of all.
    Under bf16 autocast the two wide MLPs (feature transform, decoder) run in bf16; slot attention and predictor, about a
    hundredth of the arithmetic, run in float32, and so do all logits' softmaxes.
    Source: SlotContrast, released code; official_names.py says which tensor is which.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, grid = config.slot_dim, (config.grid[0], config.grid[1])
        self.grid = grid
        self.patches = ALONE
        self.feature_dim = config.feature_dim
        self.eval_decode_frames = config.eval_decode_frames
        self.recompute_frames = config.recompute_frames
        self.transform = FeatureTransform(config.feature_dim, dim)
        self.initializer = LearnedQueries(config.num_slots, dim)
        self.recurrence = SlotRecurrence(
            SlotAttention(dim, config.gru_hidden, config.query_key_gain, config.patch_maps),
            Predictor(dim, config.predictor_heads, config.attention_scale),
            config.iters_first,
            config.iters_next,
        )
        self.decoder = MLPDecoder(
            dim,
            config.feature_dim,
            config.decoder_hidden,
            grid,
            config.decoder_positions,
            path=config.decoder_path,
            chunk_rows=config.decoder_chunk_rows,
            products=config.decoder_products,
        )
        self.projector = Projector(dim, config.feature_dim) if config.projectors else None

    @overload
    def forward(self, features: Tensor) -> ModelOutput: ...
    @overload
    def forward(self, features: Tensor, task_of: TaskOf) -> OnePassOutput: ...
    def forward(self, features, task_of=None):
        """Shapes: features (B, T, P, E) of any float dtype; they are read in float32.

        With `task_of`, the decoder learns in one pass and makes no maps: it is asked once slots and attention are known, and
        says what to decode for. All in one call, because ZeRO-3 gathers weights around a module's call.
        Raises ConfigError if P or E are not what the model was built for.
        """
        patches = self.patches
        grid = patches.grid_of_band(self.grid)
        self._check(features, grid)
        slots, attn_logits, *more = self._encode(features, patches)
        if self.projector is not None and torch.is_grad_enabled():
            slots = slots + self.projector.nothing()
        if task_of is None:
            return self._add_views(self._decode(slots, attn_logits, features, patches), more)
        carrier, decoded = slots.new_zeros(()), None
        task = task_of(Encoded(slots.detach(), attn_logits.detach(), grid))
        if task is not None:
            carrier, decoded = self.decoder(slots, task, features, band=patches.band)
        return OnePassOutput(slots, attn_logits, carrier, decoded, grid)

    def _encode(self, features: Tensor, patches: PatchGroup = ALONE) -> tuple[Tensor, ...]:
        """What _encode_part gives, of all frames; `recompute_frames` frames at a time, of which the backward then keeps nothing
        but features and what comes out."""
        queries = self.initializer(features.shape[0])
        length = self.recompute_frames or features.shape[1]
        again = self.recompute_frames > 0 and torch.is_grad_enabled()
        found = []
        for number, part in enumerate(features.split(length, dim=1)):
            if again:
                found.append(checkpoint(self._encode_part, queries, part, number == 0, patches, use_reentrant=False))
            else:
                found.append(self._encode_part(queries, part, number == 0, patches))
            queries = found[-1][0][:, -1]
        if len(found) == 1:
            return found[0]
        return tuple(torch.cat(made, dim=1) for made in zip(*found, strict=True))

    def _encode_part(self, queries: Tensor, features: Tensor, first: bool, patches: PatchGroup) -> tuple[Tensor, ...]:
        """`queries` (B, S, D): the first queries, or the slots of the frame before -> slots (B, T, S, D), attn_logits
        (B, T, S, P); then patch_maps (B, T, S, P) and the mapped features (B, T, P, D) where the model makes them."""
        features = at_least_float32(features)
        mapped = self.transform(features)
        with full_precision(features):
            found = self.recurrence(queries, at_least_float32(mapped), first, patches)
        return found if self.projector is None else (*found, mapped)

    def _add_views(self, output: ModelOutput, more: list[Tensor]) -> ModelOutput:
        """What SRL's losses read beside the rest; `more` as _encode_part gives it."""
        if self.recurrence.slot_attention.makes_patch_maps:
            output = output._replace(patch_maps=more[0])
        if self.projector is not None:
            output = output._replace(projected=self.projector(output.reconstruction, output.target, more[-1]))
        return output

    @torch.no_grad()
    def segment(self, features: Tensor, decode_frames: int | None = None) -> ModelOutput:
        """The same for whole videos in evaluation: no gradient, and never more than `decode_frames` frames (None: as
        configured) in the decoder at once."""
        self._check(features, self.grid)
        frames = self.eval_decode_frames if decode_frames is None else decode_frames
        slots, attn_logits, *_ = self._encode(features)
        return self._decode(slots, attn_logits, features, ALONE, frames)

    def _decode(
        self, slots: Tensor, attn_logits: Tensor, features: Tensor, patches: PatchGroup, frames: int | None = None
    ) -> ModelOutput:
        parts = slots.flatten(0, 1).split(frames or max(1, slots.shape[0] * slots.shape[1]))
        decoded = [self.decoder(part, band=patches.band) for part in parts]
        reconstruction, object_logits = (torch.cat(made) for made in zip(*decoded, strict=True))
        return ModelOutput(
            slots=slots,
            attn_logits=attn_logits,
            object_logits=object_logits.unflatten(0, slots.shape[:2]),
            reconstruction=reconstruction.unflatten(0, slots.shape[:2]),
            target=at_least_float32(features).detach(),
            grid=patches.grid_of_band(self.grid),
        )

    def _check(self, features: Tensor, grid: tuple[int, int]) -> None:
        num_patches = grid[0] * grid[1]
        if features.ndim != 4 or features.shape[2:] != (num_patches, self.feature_dim):
            raise ConfigError(
                f"features have shape {tuple(features.shape)}; the model was built for (B, T, {num_patches}, {self.feature_dim})"
                "; set model.grid and model.feature_dim to what the shards hold"
            )
