"""Every alert fires when its fault happens to a live run, and a clean run beside it raises none. Real Prometheus, real runs.

The rules are those that are shipped, with a minute of two seconds: eight runs then take about a minute together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.integration.alert_runs import PROOF, Run, make_runs, starve
from tests.integration.faulty_server import FaultyServer
from tests.integration.prometheus_server import MONITORING, Prometheus, faster, find_binaries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MINUTE_S = 2.0
ALERTS = {
    rule["alert"] for group in yaml.safe_load((MONITORING / "rules/alerts.yml").read_text())["groups"] for rule in group["rules"]
}


class Story:
    """What Prometheus saw, (run, alert) of all that fired; and what else happened, by run."""

    def __init__(self, fired: set[tuple[str, str]], problems: dict[str, str]) -> None:
        self.fired, self.problems = fired, problems

    def table(self) -> str:
        runs = [f"{name:<10}{', '.join(sorted(alert for run, alert in self.fired if run == name)) or '-'}" for name in PROOF]
        return "\n".join(["run       alerts that fired", *runs])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("alerts")
    (folder / "data").mkdir()
    runs: dict[str, Run] = {}
    with Prometheus(find_binaries()[0], folder / "prometheus", MINUTE_S) as server, FaultyServer(folder / "data") as shards:
        try:
            runs |= make_runs(folder, server, shards)
            problems = _happen(runs, shards)
            made = Story(server.fired("10m"), problems)
            print(f"\n{made.table()}")
            yield made
        finally:
            for run in runs.values():
                run.end()


def _happen(runs: dict[str, Run], shards: FaultyServer) -> dict[str, str]:
    """All at the same time; why it did not, for each run to which something else happened. All runs but the clean one end."""

    def happen(name: str) -> str:
        what, run = PROOF[name][0], runs[name]
        try:
            what(run, shards) if what is starve else what(run)  # type: ignore[operator]
        except (Exception, pytest.fail.Exception) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if name != "clean":
                run.end()
        return ""

    with ThreadPoolExecutor(len(runs)) as pool:
        return dict(zip(runs, pool.map(happen, runs), strict=True))


def test_a_clean_run_raises_no_alert(story: Story) -> None:
    assert story.problems["clean"] == ""
    assert not {alert for run, alert in story.fired if run == "clean"}


@pytest.mark.parametrize(("run", "alert"), [(run, alert) for run, (_, alerts) in PROOF.items() for alert in alerts])
def test_the_alert_fires(story: Story, run: str, alert: str) -> None:
    assert (run, alert) in story.fired, story.problems[run]


@pytest.mark.parametrize("run", PROOF)
def test_everything_happened_as_it_should(story: Story, run: str) -> None:
    assert story.problems[run] == ""


def test_every_alert_has_its_fault() -> None:
    assert {alert for _, alerts in PROOF.values() for alert in alerts} == ALERTS


def test_the_table_of_the_readme_is_that_of_the_test() -> None:
    rows = re.findall(r"^\| `(Slotstream\w+)` \| `(\w+)` \|", (MONITORING / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted((alert, run) for run, (_, alerts) in PROOF.items() for alert in alerts)


def test_at_another_pace_only_durations_change() -> None:
    for path in (MONITORING / "rules").glob("*.yml"):
        shipped, scaled = yaml.safe_load(path.read_text()), yaml.safe_load(faster(path.read_text(), MINUTE_S))
        for before, after in zip(shipped["groups"], scaled["groups"], strict=True):
            for one, other in zip(before["rules"], after["rules"], strict=True):
                bare = [re.sub(r"\[\w+\]|(?<=offset )\w+|(?<=\* )[\d.]+", "_", rule["expr"]) for rule in (one, other)]
                assert bare[0] == bare[1]
    text = "for: 5m, interval: 15s, x:increase1h > 5 * 60 unless y[1h]"
    assert faster(text, 2) == "for: 10000ms, interval: 500ms, x:increase1h > 5 * 2 unless y[120000ms]"
