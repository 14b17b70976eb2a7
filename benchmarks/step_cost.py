"""What a training step costs, part by part. Settings and a shape come in, rows go out.

The trainer's own train_step runs with its own model, objective and engine; readings of the clock are hung on them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import WHOLE, PartClock, Seconds, median_of, peak_of_tensors, peak_resident_bytes
from benchmarks.shapes import Shape
from benchmarks.table import Row
from data_pipeline.batch import ClipBatch
from trainer.build import build_model
from trainer.config import ObjectiveConfig, RunConfig
from trainer.engine import Engine, choose_device
from trainer.model.network import VideoSlotModel
from trainer.model.outputs import Decoded, Encoded, ModelOutput
from trainer.objective import Lessons, Objective, TermValue
from trainer.step import train_step

MIB = 2**20
REST = "rest of the step"
PARTS = (
    "feature transform",
    "slot attention + predictor",
    "decoder",
    "feature reconstruction",
    "SSync selection + losses",
    "slot contrast",
    "backward",
    "optimizer",
    REST,
)
WARM_UP = 2


class TimedObjective(Objective):
    """An objective whose terms are timed one by one: SSync's come from an objective with those weights alone.

    Where the decoder learns in one pass, its row holds reconstruction and boundary loss and their gradient, too.
    """

    def __init__(self, config: ObjectiveConfig, max_steps: int, clock: PartClock) -> None:
        super().__init__(config, max_steps)
        self.clock = clock
        without = dataclasses.replace(config.ssync, boundary_weight=0.0, interior_weight=0.0)
        self._reconstruction = Objective(dataclasses.replace(config, ssync=without), max_steps)
        silent = dataclasses.replace(config.feature_reconstruction, weight=0.0)
        self._ssync = Objective(dataclasses.replace(config, feature_reconstruction=silent), max_steps)

    def local(self, output: ModelOutput, step: int) -> dict[str, TermValue]:
        with self.clock.part("feature reconstruction"):
            terms = self._reconstruction.local(output, step)
        with self.clock.part("SSync selection + losses"):
            return terms | self._ssync.local(output, step)

    def lessons(self, encoded: Encoded, step: int) -> Lessons | None:
        with self.clock.part("SSync selection + losses"):
            return super().lessons(encoded, step)

    def local_one_pass(self, encoded: Encoded, decoded: Decoded, lessons: Lessons | None, step: int) -> dict[str, TermValue]:
        with self.clock.part("SSync selection + losses"):
            return super().local_one_pass(encoded, decoded, lessons, step)

    def coupled(self, slots: Tensor, own: slice, step: int) -> dict[str, TermValue]:
        with self.clock.part("slot contrast"):
            return super().coupled(slots, own, step)


class TimedEngine(Engine):
    """The engine, with its backward and its update timed."""

    clock: PartClock

    def backward(self, loss: Tensor) -> None:
        with self.clock.part("backward"):
            super().backward(loss)

    def step(self, lr: float) -> None:
        with self.clock.part("optimizer"):
            super().step(lr)


class StepUnderTest:
    """A model, an objective and an engine at a shape, ready to step. `clock` holds the parts of the steps since take()."""

    def __init__(self, run: RunConfig, shape: Shape, device_name: str) -> None:
        self.run, self.shape = run, shape
        self.device = choose_device(device_name)
        self.clock = PartClock(self.device)
        self.model = build_model(run.model, seed=0)
        _time_children(self.model, self.clock)
        self.objective = TimedObjective(run.objective, run.optim.max_steps, self.clock)
        self.engine = TimedEngine(self.model, run.optim, run.parallel, self.device)
        self.engine.clock = self.clock
        self.batch = feature_batch(run, shape).to(self.device)
        self.steps = 0

    def __call__(self) -> None:
        """One update of the weights."""
        train_step(self.engine, self.objective, self.batch, [self.shape.clips], self.steps, lr=self.run.optim.lr)
        self.steps += 1


def feature_batch(run: RunConfig, shape: Shape, seed: int = 1) -> ClipBatch:
    """Random features. Every tensor of a step has a size that its values do not change, so random ones cost what real ones do."""
    random = torch.Generator().manual_seed(seed)
    grid = (run.model.grid[0], run.model.grid[1])
    features = torch.randn(shape.clips, shape.frames, grid[0] * grid[1], run.model.feature_dim, generator=random)
    return ClipBatch(
        features=features,
        grid=grid,
        num_real=shape.clips,
        sample_ids=tuple(range(shape.clips)),
        keys=tuple(f"clip{number}" for number in range(shape.clips)),
        starts=(0,) * shape.clips,
    )


def _time_children(model: VideoSlotModel, clock: PartClock) -> None:
    children: dict[str, nn.Module] = {
        "feature transform": model.transform,
        "slot attention + predictor": model.recurrence,
        "decoder": model.decoder,
    }
    for name, module in children.items():
        module.register_forward_pre_hook(_before(clock, name))
        module.register_forward_hook(_after(clock, name))


def _before(clock: PartClock, name: str) -> Callable[[nn.Module, object], None]:
    return lambda module, args: clock.start(name)


def _after(clock: PartClock, name: str) -> Callable[[nn.Module, object, object], None]:
    return lambda module, args, output: clock.stop(name)


def time_rows(step: StepUnderTest, rounds: int) -> list[Row]:
    """The median step, whole and by part. A share is of CPU time, of wall time on CUDA; the shares of all parts add up to 1."""
    for _ in range(WARM_UP):
        step()
    step.clock.take()
    readings = []
    for _ in range(rounds):
        with step.clock.part(WHOLE):
            step()
        readings.append(_with_rest(step.clock.take()))
    section = f"training step, B={step.shape.clips} T={step.shape.frames}"
    rows = [_part_row(section, name, readings, step.device) for name in PARTS if name in readings[0]]
    whole = median_of([reading[WHOLE] for reading in readings])
    rows.append(
        Row(
            section=section,
            name="whole step",
            cpu_ms=whole.cpu * 1e3,
            wall_ms=whole.wall * 1e3,
            share=1.0,
            clips_per_s=step.shape.clips / whole.wall,
        )
    )
    return rows


def _with_rest(parts: dict[str, Seconds]) -> dict[str, Seconds]:
    """What no part claims: DeepSpeed's own work, counts and agreement, slot contrast's gradient with respect to the slots."""
    whole = parts[WHOLE]
    named = [value for name, value in parts.items() if name != WHOLE]
    rest = Seconds(whole.cpu - sum(part.cpu for part in named), whole.wall - sum(part.wall for part in named))
    return parts | {REST: rest}


def _part_row(section: str, name: str, readings: list[dict[str, Seconds]], device: torch.device) -> Row:
    seconds = median_of([reading[name] for reading in readings])
    column = 1 if device.type == "cuda" else 0
    total = statistics.fmean(reading[WHOLE][column] for reading in readings)
    share = statistics.fmean(reading[name][column] for reading in readings) / total
    return Row(section=section, name=name, cpu_ms=seconds.cpu * 1e3, wall_ms=seconds.wall * 1e3, share=share)


def memory_rows(step: StepUnderTest) -> list[Row]:
    """Highest memory of one step above what lies there between steps: parameters, Adam's moments, features."""
    section = "memory of a step, above parameters, moments and features"
    peak = peak_of_tensors(step, step.device)
    beside = "" if peak.largest_block is None else f"largest block {peak.largest_block / MIB:,.1f} MiB"
    rows = [Row(section=section, name="tensors", peak_mib=peak.bytes / MIB, beside=beside)]
    if step.device.type == "cpu":
        grown, reset = peak_resident_bytes(step)
        beside = "" if reset else "the high-water mark could not be reset: too large"
        rows.append(Row(section=section, name="resident memory of the process", peak_mib=grown / MIB, beside=beside))
    kept = sum(parameter.numel() * parameter.element_size() for parameter in step.model.parameters())
    rows.append(Row(section=section, name="for comparison: parameters", peak_mib=kept / MIB))
    return rows
