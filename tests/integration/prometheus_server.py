"""A real Prometheus for tests: our configuration, our rules perhaps at another pace, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.ranks import free_port

MONITORING = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"
PATIENCE = 120.0
SECONDS = {"s": 1, "m": 60, "h": 3600}


def find_binaries() -> tuple[str, str]:
    """prometheus and promtool. Where they are missing the test is skipped; in CI it fails."""
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] and found[1]:
        return found[0], found[1]
    message = "prometheus and promtool are not installed (Debian: apt-get install prometheus)"
    pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def faster(rules: str, minute_s: float) -> str:
    """A rule file in which a minute takes `minute_s` seconds: every duration, and the factor 60 of seconds that are compared.

    Nothing else changes: the expressions are those that are shipped.
    """
    pace = minute_s / 60
    scaled = re.sub(r"\b(\d+)([smh])\b", lambda found: f"{round(int(found[1]) * SECONDS[found[2]] * pace * 1000)}ms", rules)
    return re.sub(r"\* 60\b", f"* {minute_s:g}", scaled)


class Prometheus:
    """`targets` is the folder that it watches. It scrapes twice a second. `minute_s`: the pace of the rules, None: no rules."""

    def __init__(self, binary: str, folder: Path, minute_s: float | None = None) -> None:
        self.config = folder / "prometheus.yml"
        self.targets = folder / "targets"
        self.log = folder / "server.log"
        self.targets.mkdir(parents=True)
        self.config.write_text((MONITORING / "prometheus.yml").read_text().replace("_interval: 5s", "_interval: 500ms"))
        if minute_s is not None:
            (folder / "rules").mkdir()
            for path in (MONITORING / "rules").glob("*.yml"):
                (folder / "rules" / path.name).write_text(faster(path.read_text(), minute_s))
        self.url = f"http://127.0.0.1:{free_port()}"
        address = self.url.removeprefix("http://")
        flags = [f"--config.file={self.config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([binary, *flags], stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Prometheus:
        try:
            wait_until(self.ready, self.log.read_text)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an API answer; an answer with an error status raises."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            content = json.load(answer)
        assert content["status"] == "success", content
        return content["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def active(self) -> list[dict[str, Any]]:
        return self.get("targets", state="active")["activeTargets"]

    def ready(self) -> bool:
        try:
            return bool(self.get("status/runtimeinfo"))
        except OSError:
            return False

    def firing(self) -> set[tuple[str, str]]:
        """(run, alert) of all that fire now."""
        found = self.query('ALERTS{alertstate="firing"}')
        return {(item["metric"]["run"], item["metric"]["alertname"]) for item in found}

    def fired(self, within: str) -> set[tuple[str, str]]:
        """(run, alert) of all that fired at some time."""
        found = self.query(f'count_over_time(ALERTS{{alertstate="firing"}}[{within}])')
        return {(item["metric"]["run"], item["metric"]["alertname"]) for item in found}


def wait_until(condition: Callable[[], Any], explain: Callable[[], str], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {patience:g} s; {explain()[-4000:]}")
        time.sleep(0.2)
