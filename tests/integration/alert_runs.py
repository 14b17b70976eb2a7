"""Real local runs, each with a fault that a real Prometheus must notice: what happens to each, and the alerts that it must raise.

Used by test_alerts.py. Faults come from outside (signals, damaged files, a server that sends damaged bytes) where they can, else
from alert_worker.py, while the run goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.processes import processes_with
from data_pipeline import targets
from data_pipeline.shards import DatasetIndex
from tests.integration.faulty_server import FaultyServer, flipped
from tests.integration.prometheus_server import Prometheus, wait_until
from tests.integration.tiny_run import arguments, make_shards
from tests.unit.tiny_shards import flip_byte

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "integration" / "alert_worker.py"
PATIENCE = 240.0


class Run:
    """One run of the local backend, under its launcher."""

    def __init__(self, name: str, folder: Path, server: Prometheus, ranks: int = 1, *more: str) -> None:
        self.name, self.server, self.ranks = name, server, ranks
        self.folder = folder / "runs" / name
        self.data = make_shards(folder / "data" / name)
        self._log = folder / f"{name}.log"
        fixed = ("observe.metrics=true", f"observe.targets_dir={server.targets}", "observe.record_order=false",
                 "optim.max_steps=1000000", "checkpoint.every_steps=40", "checkpoint.max_failures=1000000",
                 "observe.log_every=5")  # fmt: skip
        self._words = [
            sys.executable, str(ROOT / "cluster" / "launch.py"), "--backend", "local", "--ranks-per-node", str(ranks),
            "--gpus-per-node", "0", "--hang-after", "0", "--command", str(WORKER),
            *arguments(self.data, folder / "runs", name, *fixed, *more)[2:],
        ]  # fmt: skip

    def start(self) -> Run:
        with open(self._log, "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.launcher = subprocess.Popen(self._words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        return self

    def told(self) -> str:
        now = self.server.query(f'{{run="{self.name}",rank="0"}}') if self.server.process.poll() is None else []
        values = {f"{item['metric'].get('__name__')}{item['metric'].get('alertname', '')}": item["value"][1] for item in now}
        return f"{self.name}: {self._log.read_text()[-2500:]}\n{values}"

    def until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, self.told, PATIENCE)

    def updates(self, at_least: int, attempt: int = 1) -> None:
        """Wait until Prometheus has seen so many updates of an attempt."""
        query = f'slotstream_steps_total{{run="{self.name}",attempt="{attempt}"}} >= {at_least}'
        self.until(lambda: len(self.server.query(query)) == self.ranks)

    def fires(self, *alerts: str) -> None:
        self.until(lambda: {(self.name, alert) for alert in alerts} <= self.server.firing())

    def fault(self, name: str, on: bool = True) -> None:
        path = self.folder / f"fault_{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if on else path.unlink()

    def signal(self, number: int, rank: int = 0) -> None:
        for pid in processes_with({"SLOTSTREAM_RUN_DIR": str(self.folder), "RANK": str(rank)}):
            os.kill(pid, number)

    def listed(self) -> Path:
        return targets.watched_file(self.folder / "monitoring" / "targets.json", self.server.targets)

    def end(self) -> None:
        """By force: nothing of it is left. Prometheus may miss its ranks for a moment."""
        if hasattr(self, "launcher"):
            self.listed().unlink(missing_ok=True)
            self.launcher.kill()
            self.launcher.wait()
            for rank in range(self.ranks):
                self.signal(signal.SIGKILL, rank)


# -- what happens to each ---------------------------------------------------------------------------------------------------


def stall(run: Run) -> None:
    """The loader hands out nothing any more."""
    run.start().updates(5)
    run.fault("stall")
    run.fires("SlotstreamStalled")


def blow_up(run: Run) -> None:
    """No first batch for long; and then it holds no numbers."""
    run.fault("stall")
    run.start().fires("SlotstreamNotStarted")
    run.fault("poison")
    run.fault("stall", on=False)
    run.fires("SlotstreamNonFinite")


def die(run: Run) -> None:
    """kill -9 of everything, so that nobody takes the list back."""
    run.start().updates(5)
    run.launcher.send_signal(signal.SIGSTOP)
    run.signal(signal.SIGKILL)
    run.launcher.kill()
    run.fires("SlotstreamRankDown")
    long_ago = run.listed().stat().st_mtime - targets.STALE_S - 1
    os.utime(run.listed(), (long_ago, long_ago))
    targets.clean_stale(run.server.targets)  # as the next run does, and a monitor
    assert not run.listed().exists()
    run.until(lambda: (run.name, "SlotstreamRankDown") not in run.server.firing())


def lag(run: Run) -> None:
    """Rank 1 reads late; then it vanishes from the list."""
    run.start().updates(5)
    run.fault("slow")
    run.fires("SlotstreamSlowRank")
    (first, _) = json.loads(run.listed().read_text())
    targets.write_targets(run.listed(), [first])
    run.fires("SlotstreamRankMissing")


def lose_the_disk(run: Run) -> None:
    """Checkpoints cannot be written any more; a sample on the disk is damaged."""
    run.start()
    run.until(lambda: list(run.folder.glob("checkpoints/step_*/manifest.json")))
    run.updates(5)
    (run.folder / "checkpoints").rename(run.folder / "away")
    (run.folder / "checkpoints").write_text("a file where the folder should be")
    damage(run.data / "train", 0)
    run.fires("SlotstreamCheckpointOld", "SlotstreamSamplesSkipped")


def starve(run: Run, shards: FaultyServer) -> None:
    """The server of its shards sends damaged bytes; then every batch comes late."""
    run.start().updates(5)
    shards.faults["train-000001.tar"] = [flipped(100)]
    run.fires("SlotstreamShardCorrupt")
    run.fault("starve")
    run.fires("SlotstreamDataStarved")


def fall_over_and_over(run: Run) -> None:
    """kill -9 of the rank as soon as it has saved, four times; once its newest checkpoint was damaged before."""
    run.start()
    for attempt in range(1, 5):
        run.updates(25, attempt)
        run.until(lambda: len(list(run.folder.glob("checkpoints/step_*/manifest.json"))) > 1)
        run.signal(signal.SIGSTOP)  # else a newer checkpoint might come
        if attempt == 1:
            newest = max(run.folder.glob("checkpoints/step_*"))
            flip_byte(newest / "model.safetensors", 200)
        run.signal(signal.SIGKILL)
    run.fires("SlotstreamRestartLoop")


def go_on(run: Run) -> None:
    """Nothing happens."""
    run.start().updates(50)


def damage(folder: Path, number: int) -> None:
    """Break every frame of every view of a sample."""
    sample = DatasetIndex.load(folder).samples[number]
    for place in sample.members["features"].values():
        for frame in range(sample.frames):
            flip_byte(folder / f"{folder.name}-{sample.shard:06d}.tar", place["data_offset"] + frame * place["frame_bytes"])


PROOF = {  # run: (what happens to it, the alerts that it must raise)
    "clean": (go_on, ()),
    "stalled": (stall, ("SlotstreamStalled",)),
    "poisoned": (blow_up, ("SlotstreamNotStarted", "SlotstreamNonFinite")),
    "killed": (die, ("SlotstreamRankDown",)),
    "slow": (lag, ("SlotstreamSlowRank", "SlotstreamRankMissing")),
    "diskless": (lose_the_disk, ("SlotstreamCheckpointOld", "SlotstreamSamplesSkipped")),
    "starved": (starve, ("SlotstreamDataStarved", "SlotstreamShardCorrupt")),
    "looping": (fall_over_and_over, ("SlotstreamRestartLoop", "SlotstreamCheckpointDamaged")),
}


def make_runs(folder: Path, server: Prometheus, shards: FaultyServer) -> dict[str, Run]:
    """All runs of PROOF, not started. `shards` serves the folder `folder`/data."""
    root = f"{shards.url}/starved"
    cache = folder / "cache"
    more = {
        "clean": (2, "checkpoint.every_steps=100"),
        "slow": (2,),
        "poisoned": (1, "--max-restarts=0"),
        "diskless": (1, "data.max_skip_fraction=0.5"),
        "looping": (1, "checkpoint.every_steps=10"),
        "starved": (1, f"data.root={root}", f"data.remote.cache_dir={cache}", "data.remote.cache_bytes=1"),
    }
    return {name: Run(name, folder, server, *more.get(name, ())) for name in PROOF}
