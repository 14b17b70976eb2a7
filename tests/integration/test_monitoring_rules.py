"""Recording and alert rules: promtool accepts them; every alert is tested, explained, and about what ranks serve."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.shard_files import FileCounters
from trainer.observe.prometheus import PHASES, Exporter, StepStats

MONITORING = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"
RULES = MONITORING / "rules"
OTHER_THRESHOLDS = {  # what an alert's tests must notice
    "SlotstreamStalled": ("timestamp_seconds) > 5 * 60", "timestamp_seconds) > 6 * 60"),
    "SlotstreamRestartLoop": ("increase1h > 3", "increase1h >= 3"),
    "SlotstreamRankDown": ("== 0) > 0", "== 0) > 2"),
    "SlotstreamSlowRank": ("ratio5m > 1.5", "ratio5m > 1.4"),
    "SlotstreamCheckpointOld": (":intervals > 2", ":intervals > 3"),
    "SlotstreamDataStarved": ("ratio5m > 0.3", "ratio5m > 0.29"),
}
TESTS = sorted((RULES / "tests").glob("*.yml"))


def rules_of(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


RECORDS = {rule["record"]: rule for rule in rules_of(RULES / "recording.yml")}
ALERTS = {rule["alert"]: rule for rule in rules_of(RULES / "alerts.yml")}


def cases_of(alert: str) -> list[dict[str, Any]]:
    groups = [group for path in TESTS for group in yaml.safe_load(path.read_text())["tests"]]
    return [case for group in groups for case in group.get("alert_rule_test", []) if case["alertname"] == alert]


def promtool(*arguments: str | Path) -> str:
    """What promtool said. Fails when it is not content; where it is missing the test is skipped, in CI it fails."""
    binary = shutil.which("promtool")
    if binary is None:
        message = "promtool is not installed (Debian: apt-get install prometheus)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def served() -> set[str]:
    """Names that a rank serves once everything has happened to it, and `up`, which Prometheus adds."""
    exporter = Exporter(run_info={"seed": "1"}, restarts=1, checkpoint_every=10)
    exporter.observe_step(StepStats(2, 6, dict.fromkeys(PHASES, 0.1), 0.1, 1, 4, 0))
    exporter.observe_log({"total": 1.0}, 0.1, 1e-3)
    exporter.straggler(1.0)
    exporter.checkpoint_saved(10, 0.1)
    exporter.shard_files(FileCounters())
    text = exporter.server.exposition().decode()
    exporter.close()
    return {"up", *re.findall(r"^(slotstream_\w+)", text, re.MULTILINE)}


def asked(expression: str) -> set[str]:
    """Metrics in an expression: a name before a selector, a bracket or the end that is no function, keyword, label or string."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\boffset \w+|\b(by|on|without|group_left|ignoring)\s*\([^)]*\)', " ", expression)
    names = re.findall(r"(?<![\w:.])([a-zA-Z_][\w:]*)(?!\w*\s*\()", bare)
    return {name for name in names if name not in {"and", "or", "unless", "bool", "Inf", "NaN"}}


def test_prometheus_reads_the_rules_through_its_configuration() -> None:
    told = promtool("check", "config", MONITORING / "prometheus.yml")
    for path in (RULES / "recording.yml", RULES / "alerts.yml"):
        assert re.search(rf"Checking \S*{path.name}\s+SUCCESS: {len(rules_of(path))} rules found", told)
    promtool("check", "rules", *sorted(RULES.glob("*.yml")))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_pass_their_tests(path: Path) -> None:
    promtool("test", "rules", path)


def test_rules_with_other_thresholds_fail_their_tests(tmp_path: Path) -> None:
    changed = shutil.copytree(RULES, tmp_path / "rules")
    text = (changed / "alerts.yml").read_text()
    for before, after in OTHER_THRESHOLDS.values():
        assert text.count(before) == 1
        text = text.replace(before, after)
    (changed / "alerts.yml").write_text(text)
    with pytest.raises(AssertionError) as failure:
        promtool("test", "rules", *sorted((changed / "tests").glob("*.yml")))
    told = str(failure.value).partition("assert 1 == 0")[0]
    assert set(re.findall(r"alertname: (\w+)", told)) == set(OTHER_THRESHOLDS)


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_every_alert_is_seen_to_fire_and_to_stay_silent(alert: str) -> None:
    fires = [bool(case.get("exp_alerts")) for case in cases_of(alert)]
    assert any(fires) and not all(fires)


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_every_alert_is_complete_and_has_its_paragraph(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("warning", "critical") and "for" in rule
    assert "$value" in rule["annotations"]["description"] and "$labels.run" in rule["annotations"]["summary"]
    assert rule["annotations"]["runbook"] == f"runbook.md#{alert.lower()}"
    found = re.search(rf"^## {alert}\n\n(.*?)(?=^## |\Z)", (MONITORING / "runbook.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found and found[1].startswith(f"**{rule['labels']['severity']}: ")
    assert all(part in found[1] for part in ("*Means:*", "*Look at:*", "*Do:*"))


def test_the_runbook_explains_no_alert_that_is_gone() -> None:
    assert set(re.findall(r"^## (\w+)$", (MONITORING / "runbook.md").read_text(), re.MULTILINE)) == set(ALERTS)


@pytest.mark.parametrize("name", sorted({**RECORDS, **ALERTS}))
def test_rules_ask_only_for_what_a_rank_serves_or_a_rule_records(name: str, served: set[str]) -> None:
    names = asked({**RECORDS, **ALERTS}[name]["expr"])
    assert names and not names - served - set(RECORDS)


def test_the_tests_feed_only_what_a_rank_serves(served: set[str]) -> None:
    fed = {asked_name for path in TESTS for asked_name in re.findall(r"series: '?([\w:]+)\{", path.read_text())}
    assert fed and not fed - served


def test_a_metric_that_nobody_serves_is_found() -> None:
    assert asked('max by (run) (rate(a_total{b="c"}[5m])) > 0 or d:e:f == Inf unless on (g) h{i=~"j"}') == {
        "a_total",
        "d:e:f",
        "h",
    }
