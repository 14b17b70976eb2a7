"""Learning rate factors against the released schedules."""

from __future__ import annotations

import pytest
from golden_files import load

from trainer.config import OptimConfig
from trainer.schedule import SCHEDULES

OURS = {"exp_decay_with_warmup": "exp_decay_with_warmup", "cosine_decay_with_warmup": "cosine_with_warmup"}


@pytest.mark.parametrize("run", ["movi_c", "movi_e", "short", "no_warmup", "cosine"])
def test_factors(run: str) -> None:
    tensors, meta = load("metrics/lr_schedules.npz")
    settings = dict(meta[run])
    name = OURS[settings.pop("name")]
    config = OptimConfig(schedule=name, **settings)
    for column in ("factor", "lr_used_at_step"):
        for step, factor in zip(tensors[f"{run}/step"].tolist(), tensors.get(f"{run}/{column}", []), strict=False):
            assert SCHEDULES[name](step, config) == pytest.approx(float(factor), abs=1e-12), (run, step)


def test_published_numbers() -> None:
    config = OptimConfig()  # MOVi-C: 2500 warm-up steps, half the rate at 100,000
    factors = [SCHEDULES[config.schedule](step, config) for step in (0, 1, 2500, 51250, 100_000)]
    assert factors == pytest.approx([0, 0.0004, 1, 0.7071067812, 0.5], abs=1e-8)


def test_constant_keeps_the_warm_up() -> None:
    config = OptimConfig(schedule="constant", warmup_steps=4)
    assert [SCHEDULES["constant"](step, config) for step in (0, 2, 4, 9, 10**6)] == [0, 0.5, 1, 1, 1]
