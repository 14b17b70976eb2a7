"""Where metrics are served and listed: what goes wrong is one line, and the work goes on."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from cluster.commands import monitor
from cluster.flags import LaunchError
from data_pipeline import targets
from data_pipeline.compose import compose
from data_pipeline.order import World
from tests.integration.tiny_run import arguments
from trainer import distributed
from trainer.config import RunConfig
from trainer.observe import serving
from trainer.observe.serving import EvaluationMetrics, ServedRank, earlier_attempts, straggler_ratio

ALONE = World(rank=0, size=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody will scrape: do not wait for it."""
    monkeypatch.setattr(serving, "JOB_SCRAPE_S", 0.0)


def settings(tmp_path: Path, *more: str) -> RunConfig:
    return compose("train", RunConfig, arguments(tmp_path, tmp_path / "runs", "r", "observe.metrics=true", *more)[2:])


def values(text: str) -> dict[str, float]:
    families = text_string_to_metric_families(text)
    return {one.name + "".join(one.labels.values()): one.value for family in families for one in family.samples}


def scrape(path: Path) -> dict[str, float]:
    (group,) = json.loads(path.read_text())
    with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=10) as answer:
        return values(answer.read().decode())


def test_a_rank_is_listed_while_it_lives_and_leaves_its_last_values(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    served = ServedRank(settings(tmp_path), ALONE, run, attempt=3)
    assert scrape(run / "monitoring" / "targets.json")["slotstream_restarts_total"] == 2
    served.close()
    served.close()
    assert [path.name for path in (run / "monitoring").iterdir()] == ["metrics_rank0.prom"]


def test_an_address_of_another_machine_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "r"
    served = ServedRank(settings(tmp_path, "observe.metrics_address=203.0.113.7"), ALONE, run, attempt=1)
    assert served.exporter is None and not (run / "monitoring" / "targets.json").exists()
    served.wait_until_seen()
    served.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: rank 0 serves no metrics") and "203.0.113.7" in line and "observe.metrics_address" in line


def test_a_monitoring_folder_that_cannot_be_written_is_a_line_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "monitoring").write_text("a file where the folder should be")
    served = ServedRank(settings(tmp_path), ALONE, run, attempt=1)
    assert served.exporter is not None and b"slotstream_world_size 1.0" in served.exporter.server.exposition()
    served.close()
    begin, end = capsys.readouterr().err.splitlines()
    assert "targets.json cannot be written" in begin and "last values of its metrics are lost" in end


def test_an_evaluation_tells_its_scores_beside_a_run_that_trains(tmp_path: Path) -> None:
    run, config = tmp_path / "runs" / "r", settings(tmp_path)
    (run.parent / targets.SHARED).mkdir(parents=True)
    training = ServedRank(config, ALONE, run, attempt=1)
    with EvaluationMetrics(config, run, rank=0) as metrics, EvaluationMetrics(config, run, rank=1):
        listed = run / "monitoring" / "targets_evaluate.json"
        assert scrape(listed)["slotstream_evaluating"] == 1 and len(list((run.parent / targets.SHARED).iterdir())) == 2
        metrics.scored({"video_mbo": 0.25, "attn_video_mbo": 0.5})
        now = scrape(listed)
        assert now["slotstream_scorevideo_mbo"] == 0.25 and now["slotstream_evaluating"] == 0
        assert not [name for name in now if "attn" in name]
    left = values((run / "monitoring" / "metrics_evaluate.prom").read_text())
    assert left["slotstream_scorevideo_mbo"] == 0.25
    assert (run / "monitoring" / "targets.json").exists() and len(list((run.parent / targets.SHARED).iterdir())) == 1
    training.close()


def test_an_evaluation_that_fails_leaves_no_list(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    with pytest.raises(KeyError), EvaluationMetrics(settings(tmp_path), run, rank=0):
        raise KeyError
    assert [path.name for path in (run / "monitoring").iterdir()] == ["metrics_evaluate.prom"]


def test_restarts_are_those_of_the_training_and_preemptions_survive_them(tmp_path: Path) -> None:
    assert earlier_attempts(tmp_path, 1) == (0, 0)
    ends = {1: ("train", 75), 2: ("evaluate", 0), 3: ("train", 1), 4: ("train", 75), 5: ("evaluate", 75), 7: ("train", 75)}
    for number, (job, code) in ends.items():
        folder = tmp_path / "attempts" / str(number)
        folder.mkdir(parents=True)
        (folder / "launch.json").write_text(json.dumps({"job": job}))
        (folder / "verdict.json").write_text(json.dumps({"exit_code": code}))
    assert earlier_attempts(tmp_path, 6) == (3, 2)
    (tmp_path / "attempts" / "1" / "verdict.json").write_text("cut of")
    assert earlier_attempts(tmp_path, 6) == (3, 1)


@pytest.mark.parametrize(
    ("others", "ratio"), [([1.0, 3.0, 2.0], 3.0), ([6.0], 1.0), ([0.0, 0.0], None)], ids=["slow", "as the other", "nobody worked"]
)
def test_the_straggler_ratio_is_against_the_median_of_the_others(
    monkeypatch: pytest.MonkeyPatch, others: list[float], ratio: float | None
) -> None:
    def all_sum(own: torch.Tensor) -> torch.Tensor:
        return own + torch.tensor([others[0], 0.0, *others[1:]], dtype=torch.float64)

    monkeypatch.setattr(distributed, "all_sum", all_sum)
    assert straggler_ratio(6.0, World(rank=1, size=len(others) + 1), CPU) == ratio


def test_one_rank_is_compared_with_nobody() -> None:
    assert straggler_ratio(6.0, ALONE, CPU) is None


def test_a_monitor_without_prometheus_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="^prometheus is not installed; .*apt-get install prometheus") as told:
        monitor.main(["--runs", str(tmp_path)])
    assert "\n" not in str(told.value)
