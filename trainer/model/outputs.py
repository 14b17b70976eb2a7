"""ModelOutput: everything that an objective or a metric may see of the model. Shape letters of the whole project:

B clips of this rank · T frames · C H W image · P patches = Y*X grid · E backbone width · D slot width · S slots ·
O annotated objects. Order: B T first, S before P, width last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from trainer.precision import at_least_float32


class Projected(NamedTuple):
    """SRL's projections to slot width. Shapes: all (B, T, P, D): of the reconstruction, of the target without gradient, and of
    the mapped features."""

    reconstruction: Tensor
    target: Tensor
    features: Tensor


class ModelOutput(NamedTuple):
    """A NamedTuple, not a dataclass: ZeRO-3 finds a module's output tensors by walking tuples.

    Shapes: slots (B, T, S, D), corrected and not yet predicted; attn_logits (B, T, S, P), scaled q.k of the last slot
    attention iteration of each frame; object_logits (B, T, S, P), the decoder's alphas; reconstruction (B, T, P, E);
    target (B, T, P, E), the backbone features, without gradient. `grid` = (Y, X). Only where the model is told to make them:
    projected, and patch_maps (B, T, S, P), softmax over patches of the attention logits, mean over the iterations.
    """

    slots: Tensor
    attn_logits: Tensor
    object_logits: Tensor
    reconstruction: Tensor
    target: Tensor
    grid: tuple[int, int]
    projected: Projected | None = None
    patch_maps: Tensor | None = None

    def attn_maps(self) -> Tensor:
        """Softmax over slots (dim S) of the attention logits, float32. (B, T, S, P)"""
        return at_least_float32(self.attn_logits).softmax(dim=2)

    def object_maps(self) -> Tensor:
        """Softmax over slots (dim S) of the object logits, float32. (B, T, S, P)"""
        return at_least_float32(self.object_logits).softmax(dim=2)

    def first(self, num_clips: int) -> ModelOutput:
        """The output for the first `num_clips` clips: how padding is left out."""
        if num_clips == self.slots.shape[0]:
            return self
        slots, attn, objects, reconstruction, target = (tensor[:num_clips] for tensor in self[:5])
        projected = None if self.projected is None else Projected(*(tensor[:num_clips] for tensor in self.projected))
        patch_maps = None if self.patch_maps is None else self.patch_maps[:num_clips]
        return ModelOutput(slots, attn, objects, reconstruction, target, self.grid, projected, patch_maps)


class Encoded(NamedTuple):
    """What is known of a clip before the decoder runs. Shapes: slots (B, T, S, D), attn_logits (B, T, S, P)."""

    slots: Tensor
    attn_logits: Tensor
    grid: tuple[int, int]

    def first(self, num_clips: int) -> Encoded:
        """Without padding."""
        return Encoded(self.slots[:num_clips], self.attn_logits[:num_clips], self.grid)


class DecoderTask(NamedTuple):
    """What the decoder is to learn of a micro-batch: shares of the global loss, all known before it runs.

    Shapes: labels int8 and chosen bool (num_real, T, P), both None where only the reconstruction counts.
    The loss is reconstruction * sum over patches of mean_E (reconstruction - target)^2
    + boundary * sum over chosen patches of |softmax_S(object_logits / temperature) - onehot(label)|^2.
    """

    num_real: int
    reconstruction: Tensor | float
    boundary: Tensor | float = 0.0
    labels: Tensor | None = None
    chosen: Tensor | None = None
    temperature: float = 1.0


class Decoded(NamedTuple):
    """What one pass of the decoder leaves: no maps, no reconstruction.

    Shapes: object_labels int8 (B, T, P), argmax over slots of the object logits, 0 for padding; the two sums of DecoderTask
    without their factors, scalars without gradient; gradients of the loss: slots (B, T, S, D), then the decoder's parameters
    in its own order, or () where none was wanted.
    """

    object_labels: Tensor
    reconstruction_error: Tensor
    boundary_error: Tensor
    gradients: tuple[Tensor, ...] = ()


class OnePassOutput(NamedTuple):
    """What an objective sees when the decoder runs in one pass.

    `carrier` is a scalar of value 0 whose backward is the decoder's part of the loss; `decoded` is None where only the
    encoder ran.
    """

    slots: Tensor
    attn_logits: Tensor
    carrier: Tensor
    decoded: Decoded | None
    grid: tuple[int, int]


TaskOf = Callable[[Encoded], "DecoderTask | Decoded | None"]  # decode now; take this result; do not decode
