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
from trainer import checkpoint, distributed, evaluate, export, heartbeat
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
from trainer.checkpoint_saver import Saver, owner_fence
from trainer.config import RunConfig
from trainer.device_feed import DeviceFeed
from trainer.engine import Engine, choose_device
from trainer.observe.observer import Observer
from trainer.observe.run_log import read_log
from trainer.patches import data_world
from trainer.preemption import Interrupted, StopRequest
from trainer.probe import Probe
from trainer.schedule import SCHEDULES
from trainer.state import TrainState
from trainer.step import Clock, as_stored, train_step

DONE, REQUEUE = 0, 75


class Training:
    """A run between its start (or resume) and its end, on one rank. Every method is collective."""

    def __init__(self, config: RunConfig, world: World, run: Path, attempt: int, stop: StopRequest) -> None:
        self.config, self.world, self.run, self.attempt, self.stop = config, world, run, attempt, stop
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
        probe = Probe(config.model, config.seed)
        found = checkpoint.load_newest(self.checkpoints, self.observer.verify_failed, probe)
        model = build_model(config.model, config.seed)
        if found is not None:
            checkpoint.load_weights(model, found)
        self.step = self.begun_at = found.state.step if found else 0
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
        fence = owner_fence(self.run, self.attempt)
        self.saver = Saver(
            self.checkpoints, config.checkpoint, self.engine, self.observer, self.step if found else -1, probe, fence
        )
        self.observer.started(self.step, self.loader, num_parameters)

    def run_to_end(self) -> int:
        """Train to optim.max_steps, evaluate, report. Returns the exit code: 0 done, 75 stopped on request after a checkpoint."""
        try:
            if not distributed.agree(not self._asked_to_stop()):
                raise Interrupted  # while it loaded
            return self._train()
        except Interrupted:
            return self._stop_early()

    def _asked_to_stop(self) -> bool:
        return self.stop.requested

    def _train(self) -> int:
        config = self.config
        shares = real_per_rank(config, self.data_world)
        schedule = SCHEDULES[config.optim.schedule]
        if self.begun_at and self._evaluation_is_due() and not distributed.from_main(self._has_scores()):
            self._evaluate()  # it was cut off by what ended the last attempt
        batches, read = self._batches()
        while self.step < config.optim.max_steps:
            heartbeat.mine().step(self.step)
            waited = Clock("data")
            batch = next(batches)
            wait_s = waited.stop()["data"]
            lr = config.optim.lr * schedule(self.step, config.optim)
            stop, news = self._asked_to_stop, self.saver.has_news
            self.observer.stepping(self.step + 1, batch)
            report = train_step(self.engine, self.objective, batch, shares, self.step, lr, stop, read, news)
            self.step += 1
            self.observer.stepped(self.step, report, batch, wait_s, lr, self.engine, self.loader)
            self._saved(report.news)  # after the observer: it begins a new window for its rates
            if report.stop:
                return self._stop_early()
            if self._due(config.checkpoint.every_steps):
                self._save()
            if self._evaluation_is_due():
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
        self.saver.close()
        self.loader.close()
        self.observer.close()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluation_is_due(self) -> bool:
        return self._due(self.config.evaluate.every_steps) and self.step < self.config.optim.max_steps

    def _has_scores(self) -> bool:
        """Rank 0: the log has an evaluation of this step."""
        if self.world.rank != 0:
            return False
        return any(line["step"] == self.step and "evaluate/seconds" in line for line in read_log(self.run / "metrics.jsonl"))

    def _state(self) -> TrainState:
        return TrainState(step=self.step, position=self.loader.state(), features=self.features.fingerprint)

    @property
    def good_step(self) -> int:
        """The newest step whose checkpoint is on the disk and has given a finite loss; -1: none."""
        return self.saver.good_step

    @heartbeat.during("save")
    def _save(self, final: bool = False) -> None:
        saved = self.saver.saved_step
        if saved == self.step:
            return
        norm = self.engine.grad_norm()
        if norm - norm != 0:  # one read, only where a checkpoint is due
            raise StateError(
                f"gradient norm is {norm} at step {self.step}; such weights are not saved; "
                f"the last checkpoint is {f'step {saved}' if saved >= 0 else 'none'}; lower optim.lr"
            )
        self.saver.save(self._state(), final)

    @heartbeat.during("save")
    def _saved(self, news: bool) -> None:
        self.saver.stepped(self.step, news)

    def _stop_early(self) -> int:
        if self.step > self.begun_at:  # else no update was applied: there is nothing new, or nothing at all
            self._save(final=True)
        self.observer.preempted(self.step, self.stop.kind)
        return REQUEUE

    @heartbeat.during("evaluate")
    def _evaluate(self, num_pictures: int = 0) -> evaluate.Evaluation:
        began = time.perf_counter()
        model = self.engine.plain_model(lambda: build_model(self.config.model, self.config.seed))
        with self.observer.evaluating(), build_video_loader(self.config, self.world, self.online) as loader:
            result = evaluate.evaluate_model(model, loader, self.config, num_pictures, self.stop)
        self.observer.evaluated(self.step, result, time.perf_counter() - began)
        return result

    def _finish(self) -> int:
        """The last checkpoint, the scores beside their baselines, the report, and DONE."""
        config = self.config
        heartbeat.mine().phase("finish")
        self._save(final=True)
        result, baselines = None, {}
        if config.evaluate.at_end:
            result = self._evaluate(config.observe.report_videos if config.observe.report else 0)
            baselines = self._baselines() if config.evaluate.baselines else {}
        with heartbeat.during("save"):  # the same bytes again: on a slow disk longer than anything else that comes at the end
            self.saver.finish()
            if self.world.rank == 0:
                last = self.checkpoints / checkpoint.folder_name(self.step)
                export.keep_last(self.run, last, config, self.observer.console.note)
            distributed.barrier()
        if self.world.rank == 0:
            write_atomically(self.run / "DONE", f"step {self.step}\n")
        self.observer.finished(self.step, result, baselines)
        distributed.barrier()
        return DONE

    @heartbeat.during("evaluate")
    def _baselines(self) -> dict[str, dict[str, float]]:
        untrained = build_model(self.config.model, self.config.seed).to(self.device)
        with self.observer.evaluating(), build_video_loader(self.config, self.world, self.online) as loader:
            return evaluate.evaluate_baselines(loader, self.config, untrained, self.stop)
