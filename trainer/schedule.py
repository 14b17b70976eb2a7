"""Learning rate schedules: the number of updates done so far comes in, a factor on optim.lr goes out. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.config import OptimConfig


def warmup(step: int, config: OptimConfig) -> float | None:
    """step / warmup_steps until warmup_steps, then None. The very first update therefore has factor 0, as released."""
    return step / config.warmup_steps if step < config.warmup_steps else None


def exp_decay_with_warmup(step: int, config: OptimConfig) -> float:
    """Reaches decay_rate at decay_steps and goes on falling beyond. Source: SlotContrast, released code."""
    factor = warmup(step, config)
    if factor is not None:
        return factor
    return config.decay_rate ** ((step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))


def cosine_with_warmup(step: int, config: OptimConfig) -> float:
    """Half a cosine from 1 at warmup_steps to 0 at decay_steps, then 0."""
    factor = warmup(step, config)
    if factor is not None:
        return factor
    progress = min((step - config.warmup_steps) / (config.decay_steps - config.warmup_steps), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(step: int, config: OptimConfig) -> float:
    """1 after the warm-up."""
    factor = warmup(step, config)
    return 1.0 if factor is None else factor


SCHEDULES: dict[str, Callable[[int, OptimConfig], float]] = {
    "exp_decay_with_warmup": exp_decay_with_warmup,
    "cosine_with_warmup": cosine_with_warmup,
    "constant": constant,
}
