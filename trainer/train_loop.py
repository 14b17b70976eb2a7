"""When to step, log, evaluate, save and stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import StateError
from data_pipeline.files import write_atomically
from data_pipeline.order import World
from trainer import checkpoint, distributed, evaluate
from trainer.build import (
    Made,
    build_clip_loader,
    build_model,
    build_objective,
    build_online,
    build_video_loader,
    check_extractor,
    check_validation,
    real_per_rank,
)
from trainer.config import RunConfig
from trainer.device_feed import DeviceFeed
from trainer.engine import Engine, choose_device
from trainer.observe.observer import Observer
from trainer.patches import data_world
from trainer.preemption import Interrupted, StopRequest
from trainer.schedule import SCHEDULES
from trainer.state import TrainState
from trainer.step import Clock, as_stored, train_step

DONE, REQUEUE = 0, 75


class Training:
    """A run between its start (or resume) and its end, on one rank. Every method is collective."""

    def __init__(self, config: RunConfig, world: World, run: Path, attempt: int, stop: StopRequest) -> None:
        self.config, self.world, self.run, self.stop = config, world, run, stop
        self.checkpoints = run / "checkpoints"
        self.device = choose_device(config.parallel.device)
        distributed.start(self.device, config.parallel.timeout_s)
        self.observer = Observer(config, world, run, attempt)
        try:
            self._begin()
        except BaseException:
            self.observer.close()
            raise

    def _begin(self) -> None:
        """The newest checkpoint that verifies, or a new model; the data stream from there."""
        config, world = self.config, self.world
        found = checkpoint.load_newest(self.checkpoints, self.observer.verify_failed)
        model = build_model(config.model, config.seed)
        if found is not None:
            checkpoint.load_weights(model, found)
        self.step = found.state.step if found else 0
        self.online = build_online(config, self.device)
        self.patches = model.patches = distributed.form_patch_groups(
            world, config.parallel.patch_ranks, model.grid, config.parallel.timeout_s
        )
        self.data_world = data_world(world, config.parallel.patch_ranks)
        self.loader = build_clip_loader(config, self.data_world, self.step * config.optim.global_batch, self.online)
        self.features = Made.of(self.loader.dataset, self.online)
        if config.evaluate.at_end or config.evaluate.every_steps:
            check_validation(config, world, self.loader.dataset, self.online)
        if found is not None:
            found.state.position.require_same_stream(self._state().position)
            check_extractor(self.features, found.state.features)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        rows, columns = self.patches.grid_of_band(model.grid)
        example = torch.zeros(1, config.data.clip_len, rows * columns, config.model.feature_dim)
        self.engine = Engine(
            model, config.optim, config.parallel, self.device, adam=found.adam if found else None, example=example.to(self.device)
        )
        self.objective = build_objective(config, self.patches)
        self.saved_step = self.good_step = self.step if found else -1
        self._unproven: Path | None = None
        self.observer.started(self.step, self.loader, num_parameters)

    def run_to_end(self) -> int:
        """Train to optim.max_steps, evaluate, report. Returns the exit code: 0 done, 75 stopped on request after a checkpoint."""
        try:
            return self._train()
        except Interrupted:
            return self._stop_early()

    def _train(self) -> int:
        config = self.config
        shares = real_per_rank(config, self.data_world)
        schedule = SCHEDULES[config.optim.schedule]
        batches, read = self._batches()
        while self.step < config.optim.max_steps:
            waited = Clock()
            batch = next(batches)
            waited.lap("data")
            lr = config.optim.lr * schedule(self.step, config.optim)
            report = train_step(self.engine, self.objective, batch, shares, self.step, lr, self.stop.requested, read)
            self.step += 1
            self._retire()
            self.observer.stepped(self.step, report, batch, waited.seconds["data"], lr, self.engine, self.loader)
            if report.stop:
                return self._stop_early()
            if self._due(config.checkpoint.every_steps):
                self._save()
            if self._due(config.evaluate.every_steps) and self.step < config.optim.max_steps:
                self._evaluate()
        return self._finish()

    def _batches(self) -> tuple[DeviceFeed, Callable[[ClipBatch], ClipBatch]]:
        """Batches on the device, and what makes features of them. Of stored features only this rank's band goes there; an
        extractor needs whole frames."""
        online, patches = self.online, self.patches
        if online is None:
            return DeviceFeed(self.loader, self.device, patches.cut), as_stored
        return DeviceFeed(self.loader, self.device), lambda batch: patches.cut(online(batch))

    def close(self) -> None:
        self.loader.close()
        self.observer.close()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _state(self) -> TrainState:
        return TrainState(step=self.step, position=self.loader.state(), features=self.features.fingerprint)

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        norm = self.engine.grad_norm()
        if norm - norm != 0:  # one read, only where a checkpoint is due
            raise StateError(
                f"gradient norm is {norm} at step {self.step}; such weights are not saved; "
                f"the last checkpoint is {f'step {self.saved_step}' if self.saved_step >= 0 else 'none'}; lower optim.lr"
            )
        began = time.perf_counter()
        saved = checkpoint.save(self.checkpoints, self.engine, self._state())
        self.good_step, self.saved_step = self.saved_step, self.step
        self._unproven = saved.path
        self.observer.saved(self.step, saved.num_bytes, time.perf_counter() - began)

    def _retire(self) -> None:
        """Older checkpoints may go once the newest one's weights have given a finite loss."""
        if self._unproven is None:
            return
        if self.world.rank == 0:
            checkpoint.retire(self.checkpoints, self.config.checkpoint.keep, self._unproven, self.observer.verify_failed)
        self.good_step, self._unproven = self.saved_step, None

    def _stop_early(self) -> int:
        self._save()
        self.observer.preempted(self.step, self.stop.kind)
        return REQUEUE

    def _evaluate(self, num_pictures: int = 0) -> evaluate.Evaluation:
        began = time.perf_counter()
        model = self.engine.plain_model(lambda: build_model(self.config.model, self.config.seed))
        with build_video_loader(self.config, self.world, self.online) as loader:
            result = evaluate.evaluate_model(model, loader, self.config, num_pictures, self.stop)
        self.observer.evaluated(self.step, result, time.perf_counter() - began)
        return result

    def _finish(self) -> int:
        """The last checkpoint, the scores beside their baselines, the report, and DONE."""
        config = self.config
        self._save()
        result, baselines = None, {}
        if config.evaluate.at_end:
            result = self._evaluate(config.observe.report_videos if config.observe.report else 0)
            baselines = self._baselines() if config.evaluate.baselines else {}
        self._retire()
        if self.world.rank == 0:
            write_atomically(self.run / "DONE", f"step {self.step}\n")
        self.observer.finished(self.step, result, baselines)
        distributed.barrier()
        return DONE

    def _baselines(self) -> dict[str, dict[str, float]]:
        untrained = build_model(self.config.model, self.config.seed).to(self.device)
        with build_video_loader(self.config, self.world, self.online) as loader:
            return evaluate.evaluate_baselines(loader, self.config, untrained, self.stop)
