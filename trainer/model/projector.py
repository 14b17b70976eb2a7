"""SRL's two projections: reconstruction, target and mapped features come in, features of slot width to compare go out."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.model.outputs import Projected
from trainer.precision import at_least_float32, full_precision


class Projector(nn.Module):
    """One linear map without bias for what the decoder makes and its target, another for the mapped features.

    Source: SRL, released code. The target's projection takes no gradient: the map learns through the reconstruction alone.
    """

    def __init__(self, dim: int, feature_dim: int):
        super().__init__()
        self.of_reconstruction = nn.Linear(feature_dim, dim, bias=False)
        self.of_mapped = nn.Linear(dim, dim, bias=False)

    def forward(self, reconstruction: Tensor, target: Tensor, mapped: Tensor) -> Projected:
        """Shapes: reconstruction, target (B, T, P, E), mapped (B, T, P, D) -> three of (B, T, P, D), at least float32."""
        with full_precision(mapped):
            return Projected(
                self.of_reconstruction(at_least_float32(reconstruction)),
                self.of_reconstruction(at_least_float32(target)).detach(),
                self.of_mapped(at_least_float32(mapped)),
            )

    def nothing(self) -> Tensor:
        """A zero with both maps in its graph: they then have a gradient, of zero, also where no loss reads them.

        Ranks run the same collectives, and Adam's memory of them begins with the first update, as a resumed run expects.
        """
        empty = self.of_reconstruction.weight
        return self.of_reconstruction(empty.new_zeros(0, self.of_reconstruction.in_features)).sum() + (
            self.of_mapped(empty.new_zeros(0, self.of_mapped.in_features)).sum()
        )
