"""ModelOutput: everything that an objective or a metric may see of the model. Shape letters of the whole project:

B clips of this rank · T frames · C H W image · P patches = Y*X grid · E backbone width · D slot width · S slots ·
O annotated objects. Order: B T first, S before P, width last.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from trainer.precision import at_least_float32


class ModelOutput(NamedTuple):
    """A NamedTuple, not a dataclass: ZeRO-3 finds a module's output tensors by walking tuples.

    Shapes: slots (B, T, S, D), corrected and not yet predicted; attn_logits (B, T, S, P), scaled q.k of the last slot
    attention iteration of each frame; object_logits (B, T, S, P), the decoder's alphas; reconstruction (B, T, P, E);
    target (B, T, P, E), the backbone features, without gradient. `grid` = (Y, X).
    """

    slots: Tensor
    attn_logits: Tensor
    object_logits: Tensor
    reconstruction: Tensor
    target: Tensor
    grid: tuple[int, int]

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
        return ModelOutput(slots, attn, objects, reconstruction, target, self.grid)
