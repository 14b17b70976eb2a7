"""What the published code was measured to need, for comparison. No measurement here: constants and how to carry them over.

Measured earlier on a like machine (two cores of a server CPU), float32, one thread, CPU seconds, the released SlotContrast, SSync
and SRL code with PyTorch's own products. A machine's speed drifts, so seconds are multiplied by how long the released form of
the decoder takes here against there (`calibration`).
"""

from __future__ import annotations

from typing import NamedTuple

LABEL = "published code, measured earlier on a like machine"


class Published(NamedTuple):
    """Seconds, lowest and highest seen; MiB above parameters and inputs, lowest and highest."""

    seconds: tuple[float, float]
    mib: tuple[float, float] | None = None
    note: str = ""  # what it does besides


STEP_224 = Published((2.34, 2.54), (495, 495), "its ViT-S in the loop")  # P=256 B=1 T=4
STEP_224_B4 = Published((9.57, 9.57), (1575, 1575), "its ViT-S in the loop")  # the same, B=4
STEP_518 = Published((19.6, 19.6), note="its ViT-B in the loop: 11.7 s of it")  # P=1369 B=1 T=4 S=7
SSYNC_16K = Published((0.606, 0.650), (576, 592))  # all that SSync adds after the decoder, T*P = 16384
SRL_DECODER_16K = Published((7.2, 8.2), (6929, 6929))
SRL_ENCODER_16K = Published((15.6, 19.9), (9520, 9520))

# seconds of the released decoder form with its losses, forward + backward, there: (frames, patches) -> s
DECODER_THERE = {(16, 256): 7.0, (4, 1369): 6.96}


def calibration(frames: int, patches: int, seconds_here: float) -> float:
    """How much slower this machine is now than that one was."""
    return seconds_here / DECODER_THERE[frames, patches]
