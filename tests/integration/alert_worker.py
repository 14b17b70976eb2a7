"""One rank of a training with faults that a test switches on under way: `alert_worker.py key=value ...`.

A fault is on while a file fault_<name> lies in the run folder: stall (no batch comes), starve (batches come late), slow (rank 1
reads late), poison (features are not numbers). The trainer knows nothing of it. Every update is followed by a pause that belongs
to no phase, so that many runs share a machine without being slow.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

RANK, RUN = int(os.environ["RANK"]), Path(os.environ["SLOTSTREAM_RUN_DIR"])
PACE_S, LATE_S, SLOW_S = 0.05, 0.1, 0.04


def on(name: str) -> bool:
    return (RUN / f"fault_{name}").exists()


def with_faults(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def next_batch(loader: Any) -> Any:
        while on("stall"):
            time.sleep(0.05)
        if on("starve"):
            time.sleep(LATE_S)
        if on("slow") and RANK == 1:
            time.sleep(SLOW_S)
        batch = read(loader)
        if on("poison"):
            batch.features.fill_(float("nan"))
        return batch

    return next_batch


def with_pause(stepped: Callable[..., None]) -> Callable[..., None]:
    def stepped_slowly(*arguments: Any) -> None:
        stepped(*arguments)
        time.sleep(PACE_S)

    return stepped_slowly


def main(argv: list[str]) -> int | None:
    from data_pipeline.loader import ClipLoader
    from trainer.main import main as train
    from trainer.observe.observer import Observer

    ClipLoader.__next__ = with_faults(ClipLoader.__next__)  # type: ignore[method-assign]
    Observer.stepped = with_pause(Observer.stepped)  # type: ignore[method-assign]
    return train(argv)


if __name__ == "__main__":
    from trainer.process import run_as_rank

    run_as_rank(main)
