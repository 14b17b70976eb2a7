"""Feature reconstruction: the decoder's features against the frozen backbone's."""

from __future__ import annotations

from trainer.model.outputs import ModelOutput
from trainer.objective.terms import TermValue, term
from trainer.precision import at_least_float32, full_precision


def feature_reconstruction(output: ModelOutput) -> TermValue:
    """Squared error, mean over the E channels, summed over patches; the count is B*T*P patches.

    Source: DINOSAUR; the target is the raw last block, neither normalised nor standardised.
    """
    with full_precision(output.reconstruction):
        error = at_least_float32(output.reconstruction) - at_least_float32(output.target)
        return term(error.square().mean(dim=3).sum(), error.shape[:3].numel())
