"""A real Prometheus scrapes a real run of two ranks and a real build: targets, metrics, and every query of every dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.monitoring import dashboards
from data_pipeline.build_metrics import BuildMetrics
from data_pipeline.config import BuildConfig, FeaturesConfig, SourceConfig
from tests.integration.tiny_run import arguments, make_shards
from trainer.observe.prometheus import Exporter, StepStats

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
RANKS = 2
PATIENCE = 120.0


# -- without a server ------------------------------------------------------------------------------------------------------


def expressions(dashboard: Path) -> list[tuple[str, str]]:
    """(panel title, query) of a dashboard, as they are in the file."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


@pytest.fixture
def exposition() -> Iterator[str]:
    """What rank 0 serves once everything has happened to it."""
    exporter = Exporter(loss_terms=("ssync_boundary",), run_info={"seed": "1"})
    exporter.observe_step(StepStats(2, 6, {"data": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.1}, 0.1, 1, 4, 0))
    exporter.observe_log({"total": 1.0, "ssync_boundary": 0.5}, 0.1, 1e-3)
    exporter.checkpoint_saved(10, 0.1)
    exporter.score({"metric/video_fg_ari": 0.5})
    with BuildMetrics(BuildConfig(source=SourceConfig(name="synthetic"), features=FeaturesConfig(), out="shards"), 1) as build:
        yield exporter.exposition().decode() + build.exposition().decode()
    exporter.close()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_only_for_metrics_that_a_rank_serves(dashboard: Path, exposition: str) -> None:
    served = set(re.findall(r"^(slotstream_\w+)", exposition, re.MULTILINE))
    texts = [expr for _, expr in expressions(dashboard)]
    texts += [item["query"]["query"] for item in json.loads(dashboard.read_text())["templating"]["list"]]
    asked = {name for text in texts for name in re.findall(r"slotstream_\w+", text)}
    assert asked and not asked - served, "each a metric that a rank or a build serves"


def test_dashboards_are_those_of_the_code() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="there is none for Python 3.10")
    assert {path.stem for path in DASHBOARDS} == set(dashboards.DASHBOARDS)
    assert dashboards.main(["--check"]) == 0, "run python -m cluster.monitoring.dashboards"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_complete(dashboard: Path) -> None:
    content = json.loads(dashboard.read_text())
    uid = re.search(r"uid: (\S+)", (MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert uid and content["uid"] and {item["name"] for item in content["templating"]["list"]} == {"run", "attempt", "node"}
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            assert target["refId"] and target["datasource"]["uid"] == uid[1]
            assert 'run=~"$run",attempt=~"$attempt",node=~"$node"' in target["expr"], panel["title"]


# -- with the real server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def binaries() -> tuple[str, str]:
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] and found[1]:
        return found[0], found[1]
    message = "prometheus and promtool are not installed (Debian: apt-get install prometheus)"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Prometheus:
    """A Prometheus server with our configuration, in a folder of its own."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.config = folder / "prometheus.yml"
        self.targets = folder / "targets"
        self.targets.mkdir(parents=True)
        self.config.write_text((MONITORING / "prometheus.yml").read_text().replace("_interval: 5s", "_interval: 500ms"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        address = self.url.removeprefix("http://")
        flags = [f"--config.file={self.config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
        with open(folder / "server.log", "w") as log:
            self.process = subprocess.Popen([binary, *flags], stdout=log, stderr=subprocess.STDOUT)

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an API answer; an answer with an error status raises."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            content = json.load(answer)
        assert content["status"] == "success", content
        return content["data"]

    def query(self, expression: str) -> list[dict]:
        return self.get("query", query=expression)["result"]

    def active(self) -> list[dict]:
        return self.get("targets", state="active")["activeTargets"]

    def ready(self) -> bool:
        try:
            return bool(self.get("status/runtimeinfo"))
        except OSError:
            return False


@pytest.fixture
def prometheus(binaries: tuple[str, str], tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(binaries[0], tmp_path / "prometheus")
    try:
        wait_until(server.ready, lambda: (tmp_path / "prometheus" / "server.log").read_text())
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)


def start_run(tmp_path: Path, targets_dir: Path) -> subprocess.Popen:
    """A run of two nodes with one rank each that goes on until it is told to stop."""
    data = make_shards(tmp_path / "data")
    more = ("observe.metrics=true", f"observe.targets_dir={targets_dir}", "observe.report=false", "optim.max_steps=1000000",
            "evaluate.every_steps=20", "checkpoint.every_steps=50", "observe.record_order=false")  # fmt: skip
    overrides = arguments(data, tmp_path / "runs", "watched", *more)[2:]
    command = [sys.executable, str(ROOT / "cluster" / "launch.py"), "--nodes", str(RANKS), "--gpus-per-node", "0", *overrides]
    with open(tmp_path / "launcher.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def start_build(tmp_path: Path, targets_dir: Path) -> subprocess.Popen:
    """A build that goes on until it is told to stop."""
    words = ["build-shards", "name=shards", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'shards'}", "features=none",
             "source=synthetic", "source.num_train=100000", "source.num_validation=1", "source.num_frames=4",
             "source.image_size=32", f"targets_dir={targets_dir}", "workers=1", "check_space=false",
             "samples_per_shard=2"]  # fmt: skip
    command = [sys.executable, str(ROOT / "cluster" / "launch.py"), "--gpus-per-node", "0", *words]
    with open(tmp_path / "build.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def wait_until(condition: Callable[[], Any], explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE:g} s; {explain()[-4000:]}")
        time.sleep(0.2)


def concrete(expression: str, window: str = "5s") -> str:
    """A dashboard's query with its variables filled in as Grafana does for "All"."""
    return re.sub(r"\$(run|attempt|node)\b", ".*", expression.replace("$__rate_interval", window))


@pytest.mark.slow
def test_prometheus_sees_every_rank_of_a_run_until_it_ends(
    prometheus: Prometheus, binaries: tuple[str, str], tmp_path: Path
) -> None:
    checked = subprocess.run([binaries[1], "check", "config", str(prometheus.config)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    run, build = start_run(tmp_path, prometheus.targets), start_build(tmp_path, prometheus.targets)
    try:
        told = lambda: (tmp_path / "launcher.log").read_text() + (tmp_path / "build.log").read_text()  # noqa: E731
        ended = lambda: run.poll() is not None or build.poll() is not None  # noqa: E731
        wait_until(lambda: ended() or sum(t["health"] == "up" for t in prometheus.active()) == RANKS + 1, told)
        assert not ended(), told()
        _check_targets(prometheus.active())
        _check_metrics(prometheus.active(), binaries[1])
        for dashboard in DASHBOARDS:
            for title, expression in expressions(dashboard):
                missing = f"no data in {title!r}: {expression}"
                wait_until(lambda e=expression: prometheus.query(concrete(e)), lambda m=missing: m)
        assert {item["metric"]["rank"] for item in prometheus.query("rate(slotstream_steps_total[5s]) > 0")} == {"0", "1"}
        assert {"watched", "shards"} == set(prometheus.get("label/run/values"))
        run.send_signal(signal.SIGTERM)
        build.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE) == build.wait(PATIENCE) == 75, told()
        wait_until(lambda: not prometheus.active(), lambda: f"targets that stay: {prometheus.active()}")
        assert not list(prometheus.targets.iterdir())
    finally:
        for process in (run, build):
            if process.poll() is None:
                process.kill()
                process.wait(PATIENCE)


def _check_targets(active: list[dict]) -> None:
    labels = [{key: item["labels"][key] for key in ("run", "attempt", "node", "rank")} for item in active]
    expected = [{"run": "watched", "attempt": "1", "node": f"node{rank}", "rank": str(rank)} for rank in range(RANKS)]
    expected += [{"run": "shards", "attempt": "1", "node": "node0", "rank": "0"}]
    assert sorted(labels, key=lambda item: (item["run"] == "shards", item["rank"])) == expected


def _check_metrics(active: list[dict], promtool: str) -> None:
    for item in active:
        with urllib.request.urlopen(item["scrapeUrl"], timeout=10) as answer:
            text = answer.read()
        checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        series = [line for line in text.decode().splitlines() if line and not line.startswith("#")]
        assert len(series) <= 60
