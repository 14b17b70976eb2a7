"""A real Prometheus, started by `launch.py monitor`, reads a real run over HTTPS with a password; neither lands in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.ranks import free_port
from tests.integration.tiny_run import arguments, make_shards
from tests.unit.test_metrics_access import PASSWORD, make_certificate, write_rules

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        (shutil.which("prometheus") is None or shutil.which("openssl") is None) and not os.environ.get("CI"),
        reason="prometheus or openssl is not installed (apt-get install prometheus openssl)",
    ),
]
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "cluster" / "launch.py")]
PATIENCE = 120.0


def until(happens: Callable[[], Any], explain: Callable[[], str]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := happens()):
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s; {explain()[-3000:]}"
        time.sleep(0.2)
    return found


def test_prometheus_reads_a_run_over_https_with_a_password(tmp_path: Path) -> None:
    secrets, runs, port = tmp_path / "secrets", tmp_path / "runs", free_port()
    secrets.mkdir()
    certificate, key = make_certificate(secrets)
    rules = ("certificate: metrics.crt", "key: metrics.key", "user: prometheus", "password_file: password")
    access = write_rules(secrets, *rules)
    flags = ["--runs", str(runs), "--port", str(port), "--no-grafana", "--ca-file", str(certificate)]
    flags += ["--user", "prometheus", "--password-file", str(secrets / "password")]
    more = ("observe.metrics=true", f"observe.metrics_access={access}", "optim.max_steps=1000000", "checkpoint.every_steps=50")
    words = arguments(make_shards(tmp_path / "data"), runs, "guarded", *more)[2:]
    logs = [tmp_path / "monitor.log", tmp_path / "run.log"]
    started = []
    try:
        for log, command in zip(logs, (["monitor", *flags], ["--gpus-per-node", "0", *words]), strict=True):
            with log.open("w") as out:
                environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
                started.append(subprocess.Popen([*LAUNCH, *command], stdout=out, stderr=out, env=environment))
            until(lambda: (runs / ".targets").is_dir(), log.read_text)  # the monitor's, which the run finds
        told = lambda: "".join(log.read_text() for log in logs)  # noqa: E731
        up = until(lambda: [one for one in targets(port) if one["health"] == "up"], lambda: told() + str(targets(port)))
        assert up[0]["scrapeUrl"].startswith("https://") and up[0]["labels"]["run"] == "guarded"
        started[1].send_signal(signal.SIGTERM)
        assert started[1].wait(PATIENCE) == 75, told()
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    private = key.read_text().splitlines()[1]
    for path in [*(file for file in runs.rglob("*") if file.is_file()), *logs]:
        content = path.read_bytes()
        assert PASSWORD.encode() not in content and private.encode() not in content, path
    assert access in (runs / "guarded" / "config.yaml").read_text()


def targets(port: int) -> list[dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/targets?state=active", timeout=10) as answer:
            return json.load(answer)["data"]["activeTargets"]
    except OSError:
        return []


def test_rules_that_cannot_be_kept_are_a_line_and_training_goes_on(tmp_path: Path) -> None:
    more = ("observe.metrics=true", f"observe.metrics_access={tmp_path / 'nothing.yaml'}")
    words = arguments(make_shards(tmp_path / "data"), tmp_path / "runs", "open", *more)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "serves no metrics" in line)
    assert "nothing.yaml" in line and "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "open" / "DONE").is_file()
    assert not (tmp_path / "runs" / "open" / "monitoring" / "targets.json").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--user", "prometheus"], "--password-file belong together"),
        (["--ca-file", "nowhere.crt"], "--ca-file nowhere.crt"),
        (["--user", "a", "--password-file", "nowhere"], "--password-file nowhere"),
    ],
)
def test_monitor_refuses_credentials_that_it_cannot_give_on(tmp_path: Path, flags: list[str], said: str) -> None:
    words = [*LAUNCH, "monitor", "--runs", str(tmp_path), "--port", str(free_port()), *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
