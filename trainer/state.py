"""TrainState: everything that a resume needs besides tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.order import Position


@dataclass(frozen=True, slots=True)
class TrainState:
    """Updates applied so far, and where the data stream stands (the same on every rank)."""

    step: int
    position: Position
    features: str = ""  # fingerprint of the extractor whose features the weights know

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "position": asdict(self.position), "features": self.features}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TrainState:
        return TrainState(step=int(value["step"]), position=Position(**value["position"]), features=value.get("features", ""))
