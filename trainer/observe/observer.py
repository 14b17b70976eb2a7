"""Observer: what the training loop tells goes to the run log, the console, Prometheus and the report. It changes nothing.

Rank 0 writes metrics.jsonl and the report and owns the console; every rank serves its own metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import StorageError, say_error
from data_pipeline.loader import ClipLoader
from data_pipeline.order import World
from trainer import distributed
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.evaluate import Evaluation
from trainer.metrics.throughput import Meter
from trainer.observe.console import Console, counted
from trainer.observe.mirror import Follower
from trainer.observe.profiler import Profiler
from trainer.observe.prometheus import StepStats
from trainer.observe.run_log import RunLog
from trainer.observe.serving import ServedRank, earlier_attempts, straggler_ratio
from trainer.report.page import write_report
from trainer.step import StepReport


class Observer:
    def __init__(self, config: RunConfig, world: World, run: Path, attempt: int) -> None:
        self.config, self.world, self.run, self.attempt = config, world, run, attempt
        self.is_main = world.rank == 0
        self.counts_clips = world.rank % config.parallel.patch_ranks == 0  # ranks that share clips: the first speaks for all
        restarts = earlier_attempts(run, attempt)[0] if self.is_main else 0
        self.console = Console(config.optim.max_steps, enabled=self.is_main, restarts=restarts)
        self.meter = Meter()
        asked = config.observe.profile, config.observe.profile_all_ranks
        self.profiler = Profiler(run, world.rank, *asked, stops_at=self._next_pause, say=self.console.note)
        self.log: RunLog | None = None
        self._lost = 0  # lines of it that the disk has refused since it last took one
        self.order: RunLog | None = None
        self.mirror: Follower | None = None
        self.served = ServedRank(config, world, run, attempt) if config.observe.metrics else None
        self.exporter = self.served.exporter if self.served else None
        self._skipped = 0
        self._phases: dict[str, float] = {}  # seconds since the last log line
        self._own_s = 0.0  # likewise: what this rank took before it met the others
        self._steps = 0
        self._sizes: dict[str, int] = {}  # of the data set and the model; they go into the first log line of the attempt

    # -- told by the training loop ----------------------------------------------------------------------------------------

    def started(self, step: int, loader: ClipLoader, num_parameters: int) -> None:
        """The first update of this attempt comes next; `step` updates were done before."""
        if self.is_main:
            self.log = RunLog(self.run / "metrics.jsonl", resume_step=step)
            if self.config.observe.mirror:
                self.mirror = Follower(self.config.observe.mirror, self.run)
            clips, shards = len(loader.dataset), len(loader.dataset.index.shards)
            self._sizes = {"data/videos": clips, "data/shards": shards, "model/parameters": num_parameters}
            begin = f"going on from checkpoint of step {step}" if step else "starting at step 0"
            self.console.note(
                f"run {self.run.name}, attempt {self.attempt}: {begin}; {num_parameters / 1e6:.2f} M parameters, "
                f"{clips} videos in {shards} shards, "
                f"{self.world.size} rank(s), {self.config.optim.global_batch} clips an update"
            )
        if self.config.observe.record_order:
            self._begin_order(step)
        self.console.start(step)
        self.profiler.stepped(step)
        self.meter.restart()

    def _begin_order(self, step: int) -> None:
        """This rank's record goes on after `step`; rank 0 also takes back later lines of ranks that write none any more."""
        folder, share = self.run / "order", self.config.parallel.patch_ranks
        if self.counts_clips:
            self.order = RunLog(folder / f"rank{self.world.rank}.jsonl", resume_step=step)
        if self.is_main:
            for path in folder.glob("rank*.jsonl"):
                rank = int(path.stem.removeprefix("rank"))
                if rank >= self.world.size or rank % share:
                    RunLog(path, resume_step=step).close()

    def stepping(self, step: int, batch: ClipBatch) -> None:
        """Update number `step` (1 is the first) begins. Its samples are on record before any rank can save it, so that a rank
        that is killed leaves no gap; where it was not applied, the run goes on before it and its line is taken back. Raises
        StorageError where the disk refuses it: a record with a gap is none."""
        if self.order is not None:
            real = slice(batch.num_real)
            self.order.write(step, {"ids": list(batch.sample_ids[real]), "positions": list(batch.positions[real])})

    def stepped(
        self, step: int, report: StepReport, batch: ClipBatch, wait_s: float, lr: float, engine: Engine, loader: ClipLoader
    ) -> None:
        """Update number `step` (1 is the first) was applied."""
        clips = batch.num_real if self.counts_clips else 0
        self.meter.update(self.config.optim.global_batch, self.config.optim.global_batch * batch.num_frames, wait_s)
        self._steps += 1
        for phase, seconds in report.seconds.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds
        self._own_s += wait_s + report.seconds.get("forward", 0.0)
        if self.exporter is not None:
            phases = {"data": wait_s, **report.seconds}
            phases.pop("exchange", None)
            frames, depth = clips * batch.num_frames, loader.queue_depth()
            self.exporter.observe_step(StepStats(clips, frames, phases, wait_s, depth, loader.position, batch.epoch))
            self.exporter.shard_files(loader.file_counters)
            if loader.skipped > self._skipped:
                self.exporter.skipped(loader.skipped - self._skipped)
        if loader.skipped > self._skipped:
            for key, reason in list(loader.skip_reasons.items())[self._skipped :]:
                say_error(f"warning: rank {self.world.rank} replaced damaged sample {key}: {reason}")
        self._skipped = loader.skipped
        if step % self.config.observe.log_every == 0 or step == self.config.optim.max_steps or report.stop:
            self._logged(step, report, lr, engine, batch.epoch)
        if self.profiler.stepped(step):
            self.meter.restart()

    def saved(self, step: int, num_bytes: int, seconds: float, stall_s: float) -> None:
        """The checkpoint of `step` lies on the disk; it took so long, of which the training loop waited `stall_s`."""
        if self.exporter is not None:
            self.exporter.checkpoint_saved(num_bytes, seconds)
        self._write(step, {"checkpoint/bytes": num_bytes, "checkpoint/seconds": seconds, "checkpoint/stall_seconds": stall_s})
        self.meter.restart()

    def save_failed(self, step: int, why: str, in_a_row: int) -> None:
        """The checkpoint of `step` could not be written; training goes on, or the loop says why not."""
        if self.exporter is not None:
            self.exporter.checkpoint_save_failed()
        self._write(step, {"checkpoint/failures_in_a_row": in_a_row})
        self.console.note(f"warning: {why} ({in_a_row} in a row)")

    def verify_failed(self, text: str) -> None:
        """A checkpoint on disk is damaged."""
        if self.exporter is not None:
            self.exporter.checkpoint_verify_failed()
        self.console.note(f"warning: {text}")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Validation videos are scored inside."""
        with self.exporter.evaluating() if self.exporter is not None else contextlib.nullcontext():
            yield

    def evaluated(self, step: int, result: Evaluation, seconds: float) -> None:
        scores = {f"metric/{name}": value for name, value in result.scores.items()}
        self._write(step, scores | {"evaluate/seconds": seconds, "evaluate/videos": result.num_videos})
        if self.exporter is not None:
            self.exporter.score(scores)
        if scores:
            shown = [f"{name} {100 * result.scores[name]:.1f}" for name in ("video_fg_ari", "video_mbo") if name in result.scores]
            self.console.note(f"step {step}: {', '.join(shown)} on {result.num_videos} videos ({seconds:.1f} s)")
        self.meter.restart()

    def finished(self, step: int, result: Evaluation | None, baselines: Mapping[str, Mapping[str, float]]) -> None:
        """The score table with its baselines, and the report. `result` is None where nothing was to be scored."""
        self.console.close()
        if result is not None:
            self._score_table(step, result, baselines)
        if self.is_main and self.config.observe.report:
            self._report(result)
        self.console.summary(f"run {self.run.name} is done", [("folder", str(self.run))])
        if self.served is not None:
            self.served.wait_until_seen()  # the last scores of a short run would come and go between two scrapes

    def preempted(self, step: int, kind: str) -> None:
        if self.exporter is not None:
            self.exporter.preempted()
        self.console.note(
            f"stopped on request ({kind or 'another rank was asked'}) after step {step}; its checkpoint is saved; "
            "start the run again to go on"
        )

    def non_finite(self) -> None:
        if self.exporter is not None:
            self.exporter.nonfinite()
        if self.served is not None:
            self.served.wait_until_seen()  # the run ends now, and would take the news along
            with contextlib.suppress(RuntimeError):
                distributed.barrier()  # a rank that left would have the others stopped while they wait

    def close(self) -> None:
        self.profiler.close()
        self.console.close()
        if self.log is not None:
            with contextlib.suppress(OSError):  # a network file system may say only here that its disk is full
                self.log.close()
        if self.mirror is not None:
            self.mirror.close()
        if self.served is not None:
            self.served.close()
        if self.order is not None:
            self.order.close()

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _write(self, step: int, values: Mapping[str, Any]) -> bool:
        """A line of metrics.jsonl; whether it is written. A full disk must not end the run: a line that it refuses is dropped."""
        if self.log is None:
            return False
        try:
            self.log.write(step, values)
        except StorageError as error:
            if not self._lost:
                self.console.note(f"warning: {error}; training goes on, lines are dropped until one can be written")
            self._lost += 1
            return False
        if self._lost:
            self.console.note(f"{self.log.path} can be written again; {counted(self._lost, 'line')} of it lost")
            self._lost = 0
        return True

    def _next_pause(self, step: int) -> int:
        """The first update after `step` behind which the loop evaluates or ends: a profile holds neither."""
        every, last = self.config.evaluate.every_steps, self.config.optim.max_steps
        return min(last, step + every - step % every) if every else last

    def _report(self, result: Evaluation | None) -> None:
        """A page that cannot be made is no reason to fail a run that has ended well."""
        try:
            self.console.note(f"report: {write_report(self.run, result.gallery if result else [])}")
        except Exception as error:  # whatever it is: the run is done, and the page can be made again
            again = f"python -m trainer.report {self.run}"
            self.console.note(f"warning: the report cannot be written: {type(error).__name__}: {error}; try {again}")

    def _score_table(self, step: int, result: Evaluation, baselines: Mapping[str, Mapping[str, float]]) -> None:
        flat = {f"baseline/{name}/{key}": value for name, table in baselines.items() for key, value in table.items()}
        if flat:
            self._write(step, flat)
        scores = {f"metric/{name}": value for name, value in result.scores.items()}
        title = f"{self.run.name}: {result.num_videos} validation videos after {step} steps, in %"
        self.console.score_table(scores | flat, title)

    def _logged(self, step: int, report: StepReport, lr: float, engine: Engine, epoch: int) -> None:
        losses = {"total": report.total, **report.terms}
        norm = engine.grad_norm()
        values = {f"loss/{name}": value for name, value in losses.items()}
        values |= {"optim/grad_norm": norm, "optim/lr": lr, "data/epoch": epoch, "data/skipped": self._skipped}
        values |= self.meter.report()
        values |= {f"time/{phase}_ms": 1e3 * seconds / self._steps for phase, seconds in self._phases.items()}
        self._phases, self._steps = {}, 0
        if self._write(step, values | self._sizes):
            self._sizes = {}
        self.console.update(step, values)
        if self.exporter is not None:
            self.exporter.observe_log(losses, norm, lr)
            if engine.device.type == "cuda":
                self.exporter.device_memory(torch.cuda.max_memory_allocated(engine.device))
        if self.served is not None:  # every rank: they exchange their times
            ratio = straggler_ratio(self._own_s, self.world, engine.device)
            if self.exporter is not None and ratio is not None:
                self.exporter.straggler(ratio)
        self._own_s = 0.0
