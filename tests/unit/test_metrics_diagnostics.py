"""Used slots, agreement of two maps, and the meter of the training loop."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from data_pipeline.errors import DataError
from trainer.metrics.diagnostics import label_agreement, used_slots
from trainer.metrics.throughput import Meter, peak_gib


def test_used_slots_counts_over_the_whole_video() -> None:
    assert used_slots(torch.tensor([[0, 0, 2], [0, 4, 2]]), 6) == 0.5


def test_agreement_is_symmetric_and_blind_to_names() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(0, 4, (2, 3, 30), generator=generator)
    assert label_agreement(one, other) == label_agreement(other, one)
    assert abs(label_agreement(one, other)) < 0.1
    assert label_agreement(one, 3 - one) == 1
    half = torch.where(torch.arange(30) < 15, one, other)
    assert 0.1 < label_agreement(one, half) < 0.9
    with pytest.raises(DataError, match="shapes"):
        label_agreement(one, other[:2])


def test_agreement_couples_frames() -> None:
    one = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    swapped = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    assert label_agreement(one, swapped) < 0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter_reports_a_window_and_begins_another() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    for wait_s in (0.5, 0.1):
        clock.now += 2.0
        meter.update(clips=6, frames=24, data_wait_s=wait_s)
    report = meter.report()
    assert report.pop("mem/peak_gib") > 0.01
    assert report == pytest.approx(
        {"speed/clips_per_s": 3.0, "speed/frames_per_s": 12.0, "time/step_ms": 2000.0, "time/data_wait_ms": 300.0}
    )
    assert set(meter.report()) == {"mem/peak_gib"}
    clock.now += 50.0  # a pause
    meter.restart()
    clock.now += 1.0
    meter.update(clips=5, frames=5)
    assert meter.report()["speed/clips_per_s"] == 5.0


def test_meter_may_start_earlier() -> None:
    clock = Clock()
    meter = Meter(90.0, clock=clock)
    meter.update(clips=20, frames=20)
    assert meter.report()["speed/clips_per_s"] == 2.0


def test_memory_is_in_gib_and_needs_no_torch() -> None:
    assert 0.05 < peak_gib() < 64
    code = "import sys; from trainer.metrics.throughput import peak_gib as peak; "
    code += "assert 0.001 < peak() < 1; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
