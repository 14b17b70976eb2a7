"""What a build tells Prometheus, with one process and with several ranks."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fake_build import FakeExtractor, FakeSource, config_for, fake_extractor, fake_source
from prometheus_client.parser import text_string_to_metric_families

from data_pipeline import build as build_module
from data_pipeline import build_metrics
from data_pipeline.build import build


@pytest.fixture(autouse=True)
def no_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody will scrape: do not wait for it."""
    monkeypatch.setattr(build_metrics, "SCRAPE_WITHIN_S", 0.0)


source = pytest.fixture(fake_source, name="source")
extractor = pytest.fixture(fake_extractor, name="extractor")


def values(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def scrape(watched: Path) -> dict[str, Any]:
    """The one target that a Prometheus would find now: its labels and its values."""
    (group,) = json.loads(next(watched.glob("*.json")).read_text())
    with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=10) as answer:
        return group["labels"] | values(answer.read().decode())


def test_a_watched_folder_lists_the_build_while_it_works(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, seen, write_index = tmp_path / "watched", [], build_module._write_index

    def look(*arguments: Any) -> None:  # called when all shards are there
        seen.append(scrape(watched))
        write_index(*arguments)

    monkeypatch.setattr(build_module, "_write_index", look)
    source.broken = {"train_2"}
    build(config_for(tmp_path / "out", samples_per_shard=2, max_skip_fraction=0.5, targets_dir=str(watched)))
    now = seen[0]
    assert (now["run"], now["rank"], now["attempt"]) == ("out", "0", "1")
    assert now["slotstream_build_videos_total"] == now["slotstream_build_videos_wanted"] == 10
    assert now["slotstream_build_shards_total"] == now["slotstream_build_shards_wanted"] == 6
    assert now["slotstream_build_skipped_total"] == 1
    shards = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.tar"))
    assert now["slotstream_build_written_bytes_total"] == shards
    assert not list(watched.iterdir()) and not (tmp_path / "out" / "monitoring").exists()


def test_under_a_launcher_the_last_values_stay_in_the_run_folder(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "shards"
    monkeypatch.setenv("SLOTSTREAM_RUN_DIR", str(run))
    build(config_for(tmp_path / "out", samples_per_shard=3))
    left = values((run / "monitoring" / "metrics_build.prom").read_text())
    assert left["slotstream_build_videos_total"] == 10 and left["slotstream_build_ranks"] == 1
    assert not (run / "monitoring" / "targets.json").exists()
    build(config_for(tmp_path / "out", samples_per_shard=3))  # nothing is left to do
    left = values((run / "monitoring" / "metrics_build.prom").read_text())
    assert left["slotstream_build_videos_wanted"] == 0
    assert left["slotstream_build_shards_total"] == left["slotstream_build_shards_wanted"] == 4


def test_a_build_does_not_fail_for_its_metrics(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path / "out", targets_dir=str(tmp_path / "watched"), metrics_address="203.0.113.7")
    build(config)
    assert "no metrics" in capsys.readouterr().err and (tmp_path / "out" / "train" / "index.json").exists()
