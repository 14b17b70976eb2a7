"""The objective: weighted, scheduled terms over ModelOutput. A term is a sum and a count; the step divides once, globally,
so that an update does not depend on how its clips are cut over ranks and micro-batches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from trainer.config import ObjectiveConfig
from trainer.model.outputs import Decoded, DecoderTask, Encoded, ModelOutput
from trainer.objective import srl, ssync
from trainer.objective.feature_reconstruction import feature_reconstruction
from trainer.objective.slot_contrast import slot_contrast
from trainer.objective.slot_merging import reads_object_logits
from trainer.objective.terms import TermValue, term
from trainer.patches import ALONE, PatchGroup

__all__ = ["Lessons", "Objective", "TermValue", "terms_of"]


def full_weights(config: ObjectiveConfig) -> dict[str, float]:
    """Every term's weight at the steps that it is active in."""
    return {
        "feature_reconstruction": config.feature_reconstruction.weight,
        "slot_contrast": config.slot_contrast.weight,
        "ssync_boundary": config.ssync.boundary_weight,
        "ssync_interior": config.ssync.interior_weight,
        "srl_decoder": config.srl.decoder_weight,
        "srl_encoder": config.srl.encoder_weight,
        "srl_regulariser": config.srl.regulariser_weight,
    }


def terms_of(config: ObjectiveConfig) -> tuple[str, ...]:
    """Names of the terms that a run has at some step."""
    return tuple(name for name, weight in full_weights(config).items() if weight)


class Lessons(NamedTuple):
    """What SSync lets the decoder learn, and slot_map (B, S): the slot that each slot became."""

    boundary: ssync.Targets
    slot_map: Tensor


class Objective:
    """All terms of a run. A term whose weight is 0, now or always, is absent rather than zero.

    Where ranks share the patches of clips (`patches`), local terms are sums over this rank's patches.
    """

    def __init__(self, config: ObjectiveConfig, max_steps: int, patches: PatchGroup = ALONE):
        self.config = config
        self.patches = patches
        self.max_steps = max_steps
        self.ssync_start = config.ssync.start_fraction * max_steps
        self.coupled_scope = config.slot_contrast.scope

    def weight(self, name: str, step: int) -> float:
        """What multiplies a term's global mean at `step`, the number of updates done before."""
        if name.startswith("ssync_") and step < self.ssync_start:
            return 0.0
        return (full_weights(self.config) | srl.weights(self.config.srl, self.max_steps, step))[name]

    def is_active(self, name: str, step: int) -> bool:
        return self.weight(name, step) != 0

    def local(self, output: ModelOutput, step: int) -> dict[str, TermValue]:
        """Terms that are sums over clips; `output` holds real clips only (ModelOutput.first)."""
        terms = {}
        if self.is_active("feature_reconstruction", step):
            terms["feature_reconstruction"] = feature_reconstruction(output)
        if self.has_data_counts(step):
            config = self.config.ssync
            selection = ssync.select(output.attn_logits, output.object_logits, output.grid, config, self.patches)
            if self.is_active("ssync_boundary", step):
                terms["ssync_boundary"] = ssync.boundary_term(output.object_logits, selection, config)
            if self.is_active("ssync_interior", step):
                terms["ssync_interior"] = ssync.interior_term(output.attn_logits, selection, config)
        ranking = {name: make for name, make in srl.TERMS.items() if self.is_active(name, step)}
        return terms | {name: make(output, self.config.srl) for name, make in ranking.items()}

    def fits_one_pass(self, step: int) -> bool:
        """True when all that the decoder learns is known before it runs: its target, and labels of the attention map alone."""
        if any(self.is_active(name, step) for name in srl.TERMS):
            return False  # its losses read the reconstruction, the object labels or the patch maps
        return not (self.has_data_counts(step) and reads_object_logits(self.config.ssync.merge))

    def lessons(self, encoded: Encoded, step: int) -> Lessons | None:
        """What SSync draws from the encoder alone; None where it is not active. `encoded` holds real clips only."""
        if not self.has_data_counts(step):
            return None
        return Lessons(*ssync.boundary_targets(encoded.attn_logits, encoded.grid, self.config.ssync, patches=self.patches))

    def decoder_task(
        self, lessons: Lessons | None, num_real: int, num_patches: int, num_boundary: Tensor | None, step: int
    ) -> DecoderTask:
        """The decoder's shares of the global loss. `num_patches`, `num_boundary`: counts over all clips, whole frames.

        An empty set has no gradient here; where it shall be NaN, the step finds that in the term and updates nothing.
        """
        config = self.config.ssync
        reconstruction = self.weight("feature_reconstruction", step) / max(num_patches, 1)
        if lessons is None or num_boundary is None:
            return DecoderTask(num_real, reconstruction)
        weight = self.weight("ssync_boundary", step) / num_boundary.clamp(min=1)
        weight = weight / lessons.slot_map.shape[1] if config.class_reduction == "mean" else weight
        return DecoderTask(num_real, reconstruction, weight, *lessons.boundary, config.temperature)

    def local_one_pass(self, encoded: Encoded, decoded: Decoded, lessons: Lessons | None, step: int) -> dict[str, TermValue]:
        """The terms of `local` where the decoder has learnt already: its own carry no gradient any more. Real clips only."""
        config, terms = self.config.ssync, {}
        if self.is_active("feature_reconstruction", step):
            terms["feature_reconstruction"] = term(decoded.reconstruction_error, decoded.object_labels.numel())
        if lessons is not None and self.is_active("ssync_boundary", step):
            by_slots = lessons.slot_map.shape[1] if config.class_reduction == "mean" else 1
            terms["ssync_boundary"] = term(decoded.boundary_error / by_slots, lessons.boundary.chosen.sum())
        if lessons is not None and self.is_active("ssync_interior", step):
            targets = ssync.interior_targets(decoded.object_labels, lessons.slot_map, encoded.grid, config, self.patches)
            terms["ssync_interior"] = ssync.label_term(encoded.attn_logits, targets, config)
        return terms

    def coupled(self, slots: Tensor, own: slice, step: int) -> dict[str, TermValue]:
        """Terms that couple clips. `slots` (N, T, S, D) of all candidate clips; sum and count of the clips `own` only."""
        if not self.is_active("slot_contrast", step):
            return {}
        return {"slot_contrast": slot_contrast(slots, own, self.config.slot_contrast)}

    def has_data_counts(self, step: int) -> bool:
        """True when a local term's count is known only after the forward pass: SSync's sets."""
        return self.is_active("ssync_boundary", step) or self.is_active("ssync_interior", step)

    def nan_when_empty(self, name: str) -> bool:
        """True when a global count of 0 makes the term NaN, as released; else such a term is 0."""
        return name.startswith("ssync_") and self.config.ssync.empty == "nan"
