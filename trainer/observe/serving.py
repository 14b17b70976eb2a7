"""Where a rank's metrics are served and how Prometheus finds them: a run's, and those of an evaluation by itself.

Comes in: the run's settings and folder. Goes out: an Exporter with its place in the run's list of targets. Monitoring stops no
run: an address that cannot be had, or a folder that cannot be written, is one line on stderr.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from prometheus_client import Gauge

from data_pipeline import targets
from data_pipeline.errors import say_error
from data_pipeline.metrics_access import AccessError
from data_pipeline.metrics_server import MetricsServer
from data_pipeline.order import World
from trainer import distributed
from trainer.config import RunConfig
from trainer.objective import terms_of
from trainer.observe.prometheus import MAX_LOSS_TERMS, SCORES, Exporter
from trainer.run_folder import attempt_of

REQUEUE = 75  # exit code of an attempt that stopped because it was asked to
JOB_SCRAPE_S = 10.0  # a job shorter than Prometheus's interval waits so long to be seen


class ServedRank:
    """A rank's exporter, listed by rank 0 with those of all others. Construction is collective.

    `exporter` is None where the address cannot be had; the rank then trains unseen (alert SlotstreamRankMissing).
    """

    def __init__(self, config: RunConfig, world: World, run: Path, attempt: int) -> None:
        restarts, preemptions = earlier_attempts(run, attempt)
        self.exporter: Exporter | None = None
        try:
            self.exporter = Exporter(
                rank=world.rank,
                world_size=world.size,
                address=config.observe.metrics_address,
                access=config.observe.metrics_access,
                run_dir=run,
                loss_terms=terms_of(config.objective)[:MAX_LOSS_TERMS],
                run_info={"name": config.name, "features": config.data.features, "seed": str(config.seed)},
                restarts=restarts,
                preemptions=preemptions,
                checkpoint_every=config.checkpoint.every_steps,
            )
        except OSError as error:
            warn(cannot_serve(world.rank, config.observe.metrics_address, error))
        own = None
        if self.exporter is not None:
            own = _group(self.exporter.server, run, attempt, world.rank)
        groups = [group for group in distributed.gather_objects(own) if group is not None]
        self._listing: targets.Listing | None = None
        if world.rank == 0 and groups:
            self._listing = targets.Listing(run / "monitoring" / "targets.json", groups, config.observe.targets_dir, warn)

    def wait_until_seen(self) -> None:
        """What was told last is there with the next scrape: wait for it, where somebody scrapes."""
        if self.exporter is not None:
            watched = self._listing is not None and self._listing.copy is not None
            self.exporter.server.wait_for_scrape(JOB_SCRAPE_S, expected=watched)

    def close(self) -> None:
        if self._listing is not None:
            self._listing.close()
        if self.exporter is not None:
            keep_last_values(self.exporter)


class EvaluationMetrics:
    """What `python -m trainer.evaluate` exports: that it works, and its scores. A context, on rank 0; others export nothing.

    Its list of targets lies beside that of a run that may be training: monitoring/targets_evaluate.json. At the end it waits
    until Prometheus has seen the scores, where there is one, and leaves them in monitoring/metrics_evaluate.prom.
    """

    def __init__(self, config: RunConfig, run: Path, rank: int) -> None:
        self._run = run
        self._server: MetricsServer | None = None
        self._listing: targets.Listing | None = None
        if rank == 0 and config.observe.metrics:
            self._serve(config)

    def __enter__(self) -> EvaluationMetrics:
        return self

    def scored(self, scores: Mapping[str, float]) -> None:
        """Scores by bare name; those of SCORES are shown."""
        if self._server is not None:
            for name in SCORES:
                if name in scores:
                    self._score.labels(name).set(scores[name])
            self._evaluating.set(0)

    def __exit__(self, *error: object) -> None:
        if self._server is None or self._listing is None:
            return
        if error[0] is None:
            self._server.wait_for_scrape(JOB_SCRAPE_S, expected=self._listing.copy is not None)
        self._listing.close()
        try:
            self._server.close(self._run / "monitoring" / "metrics_evaluate.prom")
        except OSError as problem:
            warn(f"the last values of the metrics are lost: {problem}; nothing else is")

    def _serve(self, config: RunConfig) -> None:
        address = config.observe.metrics_address
        try:
            self._server = MetricsServer(address, config.observe.metrics_access)
        except OSError as error:
            warn(cannot_serve(0, address, error))
            return
        registry = self._server.registry
        self._evaluating = Gauge("slotstream_evaluating", "1 while validation videos are scored, else 0.", registry=registry)
        self._evaluating.set(1)
        self._score = Gauge("slotstream_score", "Scores of this evaluation in [0, 1].", ["metric"], registry=registry)
        group = _group(self._server, self._run, attempt_of(self._run), rank=0)
        path = self._run / "monitoring" / "targets_evaluate.json"
        self._listing = targets.Listing(path, [group], config.observe.targets_dir, warn)


def straggler_ratio(own_s: float, world: World, device: torch.device) -> float | None:
    """This rank's own seconds over the median of the other ranks'; None where there are no others to compare with. Collective."""
    if world.size == 1:
        return None
    everyone = torch.zeros(world.size, dtype=torch.float64, device=device)
    everyone[world.rank] = own_s
    seconds = distributed.all_sum(everyone).tolist()
    usual = statistics.median(seconds[: world.rank] + seconds[world.rank + 1 :])
    return own_s / usual if usual > 0 else None


def earlier_attempts(run: Path, attempt: int) -> tuple[int, int]:
    """(attempts of this run's training before `attempt`, those among them that ended because they were asked to).

    From what the launcher left in attempts/; an attempt without a record was a training.
    """
    before = [path for path in (run / "attempts").glob("[0-9]*") if path.name.isdigit() and int(path.name) < attempt]
    jobs = [_record(path / "launch.json").get("job", "train") for path in before]
    others = sum(job != "train" for job in jobs)
    asked = [_record(path / "verdict.json").get("exit_code") for path, job in zip(before, jobs, strict=True) if job == "train"]
    return max(0, attempt - 1 - others), asked.count(REQUEUE)


def _record(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _group(server: MetricsServer, run: Path, attempt: int, rank: int) -> dict[str, object]:
    node = os.environ.get("SLOTSTREAM_NODE", "node0")
    return targets.target_group(server.target, run=run.name, attempt=attempt, node=node, rank=rank, **server.labels)


def keep_last_values(exporter: Exporter) -> None:
    try:
        exporter.close()
    except OSError as error:
        warn(f"rank {exporter.rank}: the last values of its metrics are lost: {error}; nothing else is")


def cannot_serve(rank: int, address: str, error: OSError) -> str:
    """One line about a rank whose metrics are served nowhere."""
    if isinstance(error, AccessError):
        return f"rank {rank} serves no metrics: {error.strerror}; mend it for the next attempt; the work goes on"
    return (
        f"rank {rank} serves no metrics: {error.strerror} ({address}); it must be an address of this machine; "
        "set observe.metrics_address; the work goes on"
    )


def warn(text: str) -> None:
    say_error(f"warning: {text}")
