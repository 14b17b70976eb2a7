"""The objective: weighted, scheduled terms over ModelOutput. A term is a sum and a count; the step divides once, globally,
so that an update does not depend on how its clips are cut over ranks and micro-batches."""

from __future__ import annotations

from torch import Tensor

from trainer.config import ObjectiveConfig
from trainer.model.outputs import ModelOutput
from trainer.objective import ssync
from trainer.objective.feature_reconstruction import feature_reconstruction
from trainer.objective.slot_contrast import slot_contrast
from trainer.objective.terms import TermValue

__all__ = ["Objective", "TermValue"]


class Objective:
    """All terms of a run. A term whose weight is 0, now or always, is absent rather than zero."""

    def __init__(self, config: ObjectiveConfig, max_steps: int):
        self.config = config
        self.ssync_start = config.ssync.start_fraction * max_steps
        self.coupled_scope = config.slot_contrast.scope

    def weight(self, name: str, step: int) -> float:
        """What multiplies a term's global mean at `step`, the number of updates done before."""
        weights = {
            "feature_reconstruction": self.config.feature_reconstruction.weight,
            "slot_contrast": self.config.slot_contrast.weight,
            "ssync_boundary": self.config.ssync.boundary_weight,
            "ssync_interior": self.config.ssync.interior_weight,
        }
        gated_off = name.startswith("ssync_") and step < self.ssync_start
        return 0.0 if gated_off else weights[name]

    def is_active(self, name: str, step: int) -> bool:
        return self.weight(name, step) != 0

    def local(self, output: ModelOutput, step: int) -> dict[str, TermValue]:
        """Terms that are sums over clips; `output` holds real clips only (ModelOutput.first)."""
        terms = {}
        if self.is_active("feature_reconstruction", step):
            terms["feature_reconstruction"] = feature_reconstruction(output)
        if self.has_data_counts(step):
            config = self.config.ssync
            selection = ssync.select(output.attn_logits, output.object_logits, output.grid, config)
            if self.is_active("ssync_boundary", step):
                terms["ssync_boundary"] = ssync.boundary_term(output.object_logits, selection, config)
            if self.is_active("ssync_interior", step):
                terms["ssync_interior"] = ssync.interior_term(output.attn_logits, selection, config)
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
