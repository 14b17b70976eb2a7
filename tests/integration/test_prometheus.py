"""A real Prometheus scrapes a real run of two ranks and a real build: targets, metrics, and every query of every dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from cluster.monitoring import check, dashboards
from data_pipeline.build_metrics import BuildMetrics
from data_pipeline.config import BuildConfig, FeaturesConfig, SourceConfig
from tests.integration.faulty_server import FaultyServer
from tests.integration.panel_picture import draw, series_of
from tests.integration.prometheus_server import MONITORING, PATIENCE, Prometheus, find_binaries, wait_until
from tests.integration.tiny_run import arguments, make_shards
from trainer.observe.prometheus import Exporter, StepStats

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
RANKS = 2
PICTURES = {"run": "Time of an update by phase", "cluster": "Clips per second by run", "data": "Videos written by build"}


# -- without a server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def exposition() -> Iterator[str]:
    """What rank 0 serves once everything has happened to it."""
    exporter = Exporter(loss_terms=("ssync_boundary",), run_info={"seed": "1"})
    exporter.observe_step(StepStats(2, 6, {"data": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.1}, 0.1, 1, 4, 0))
    exporter.observe_log({"total": 1.0, "ssync_boundary": 0.5}, 0.1, 1e-3)
    exporter.checkpoint_saved(10, 0.1)
    exporter.score({"metric/video_fg_ari": 0.5})
    exporter.straggler(1.0)
    with BuildMetrics(BuildConfig(source=SourceConfig(name="synthetic"), features=FeaturesConfig(), out="shards"), 1) as build:
        yield exporter.server.exposition().decode() + build.exposition().decode()
    exporter.close()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_only_for_metrics_that_a_rank_serves(dashboard: Path, exposition: str) -> None:
    served = set(re.findall(r"^(slotstream_\w+)", exposition, re.MULTILINE))
    texts = [query for name, _, query in check.panel_queries() if name == dashboard.stem]
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
    return find_binaries()


@pytest.fixture
def prometheus(binaries: tuple[str, str], tmp_path: Path) -> Iterator[Prometheus]:
    with Prometheus(binaries[0], tmp_path / "prometheus", minute_s=2.0) as server:
        yield server


def start_run(tmp_path: Path, targets_dir: Path, root: str) -> subprocess.Popen:
    """A run of two nodes with one rank each that goes on until it is told to stop. Its shards come from a server, again and
    again: the cache holds nothing for long."""
    more = ("observe.metrics=true", f"observe.targets_dir={targets_dir}", "observe.report=false", "optim.max_steps=1000000",
            "evaluate.every_steps=20", "checkpoint.every_steps=50", "observe.record_order=false",
            f"data.remote.cache_dir={tmp_path / 'cache'}", "data.remote.cache_bytes=1")  # fmt: skip
    overrides = arguments(Path("unused"), tmp_path / "runs", "watched", f"data.root={root}", *more)[2:]
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


def rows_with_data(server: Prometheus, told: Callable[[], str]) -> list[check.Row]:
    """Each query of each panel and rule with the most series that it had while this waits for all of them to have some."""
    most: dict[check.Row, check.Row] = {}

    def all_seen() -> bool:
        ask = check.connect(server.url)
        for row in check.panels(ask, window="5s") + check.rules(ask):
            key = row._replace(series=0)
            most[key] = max(row, most.get(key, row), key=lambda one: one.series)
        return all(row.series for row in most.values())

    wait_until(all_seen, lambda: "\n".join(f"no data: {row}" for row in most.values() if not row.series) + told()[-1500:])
    return list(most.values())


@pytest.mark.slow
def test_prometheus_sees_every_rank_of_a_run_until_it_ends(
    prometheus: Prometheus, binaries: tuple[str, str], tmp_path: Path
) -> None:
    checked = subprocess.run([binaries[1], "check", "config", str(prometheus.config)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with FaultyServer(make_shards(tmp_path / "data")) as shards:
        run, build = start_run(tmp_path, prometheus.targets, shards.url), start_build(tmp_path, prometheus.targets)
        try:
            told = lambda: (tmp_path / "launcher.log").read_text() + (tmp_path / "build.log").read_text()  # noqa: E731
            ended = lambda: run.poll() is not None or build.poll() is not None  # noqa: E731
            wait_until(lambda: ended() or sum(t["health"] == "up" for t in prometheus.active()) == RANKS + 1, told)
            assert not ended(), told()
            _check_targets(prometheus.active())
            _check_metrics(prometheus.active(), binaries[1])
            rows = rows_with_data(prometheus, told)
            print("\n" + check.table(rows))
            assert {row.group for row in rows} == {"run", "cluster", "data", "recording", "alerting"}
            _check_command(prometheus)
            _draw_panels(prometheus, Path(os.environ.get("SLOTSTREAM_PICTURES", tmp_path)))
            assert {item["metric"]["rank"] for item in prometheus.query("rate(slotstream_steps_total[5s]) > 0")} == {"0", "1"}
            run.send_signal(signal.SIGTERM)
            build.send_signal(signal.SIGTERM)
            assert run.wait(PATIENCE) == build.wait(PATIENCE) == 75, told()
            wait_until(lambda: not prometheus.active(), lambda: f"targets that stay: {prometheus.active()}")
            assert not list(prometheus.targets.iterdir())
            _check_evaluation(prometheus, tmp_path)
        finally:
            for process in (run, build):
                if process.poll() is None:
                    process.kill()
                    process.wait(PATIENCE)


def _draw_panels(prometheus: Prometheus, folder: Path) -> None:
    """One panel of each dashboard as a picture. SLOTSTREAM_PICTURES=FOLDER keeps them, to be looked at."""
    for dashboard, panel in PICTURES.items():
        series = series_of(prometheus.url, dashboard, panel, 20, "5s")
        assert series and all(len(line) > 1 for line in series.values()), panel
        draw(f"{dashboard}: {panel}", series, path := folder / f"{dashboard}.png")
        with Image.open(path) as image:
            seen = {colour for _, colour in image.getcolors(2**20)}
        assert len(seen) > 1 + len(series)


def _check_command(prometheus: Prometheus) -> None:
    """What a user gets who chooses a run that there is not, or a Prometheus that there is not."""
    command = [sys.executable, "-m", "cluster.monitoring.check", "--url"]
    for words, told in (
        ([prometheus.url, "--run", "nobody"], "known: shards, watched"),
        (["http://127.0.0.1:9"], "no Prometheus"),
    ):
        done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


def _check_evaluation(prometheus: Prometheus, tmp_path: Path) -> None:
    """A job of a second or two: Prometheus has its scores, and they stay in the run folder."""
    run = tmp_path / "runs" / "watched"
    command = [sys.executable, str(ROOT / "cluster" / "launch.py"), "evaluate", "--gpus-per-node", "0", f"run={run}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((run / "evaluation.json").read_text())["scores"]
    (seen,) = prometheus.query('last_over_time(slotstream_score{attempt="2",metric="video_mbo"}[5m])')
    assert float(seen["value"][1]) == pytest.approx(scores["video_mbo"])
    assert "slotstream_score" in (run / "monitoring" / "metrics_evaluate.prom").read_text()
    wait_until(lambda: not prometheus.active(), lambda: f"targets that stay: {prometheus.active()}")


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


@pytest.mark.slow
def test_a_run_goes_on_where_its_metrics_can_neither_be_served_nor_kept(tmp_path: Path) -> None:
    (tmp_path / "runs" / "blind").mkdir(parents=True)
    (tmp_path / "runs" / "blind" / "monitoring").write_text("a file where the folder should be")
    for address, told in (("203.0.113.7", "serves no metrics"), ("127.0.0.1", "targets.json cannot be written")):
        more = ("observe.metrics=true", f"observe.metrics_address={address}", "optim.max_steps=2")
        data = tmp_path / "data" if (tmp_path / "data").exists() else make_shards(tmp_path / "data")
        command = [sys.executable, *arguments(data, tmp_path / "runs", "blind", *more)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
        shutil.rmtree(tmp_path / "runs" / "blind" / "checkpoints")
        (tmp_path / "runs" / "blind" / "DONE").unlink()
