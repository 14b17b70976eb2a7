"""`launch.py monitor` with the real Prometheus: a run of the folder is seen without a setting; both end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.commands.monitor import find_grafana, render_config
from data_pipeline import targets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"),
]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(runs: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "cluster/launch.py", "monitor", "--runs", str(runs), "--port", str(port), "--no-grafana"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    dead = targets.watched_file(tmp_path / "runs" / "dead" / "monitoring" / "targets.json", tmp_path / "runs" / targets.SHARED)
    targets.write_targets(dead, [])
    os.utime(dead, (1, 1))
    process = start(tmp_path / "runs", port)
    try:
        assert process.stdout and f":{port}" in process.stdout.readline(), process.stderr and process.stderr.read()
        yield process, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


def get(port: int, path: str) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def test_runs_of_the_folder_are_seen(monitor: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    process, port = monitor
    run = tmp_path / "runs" / "movi"
    watched = targets.watched_folder(run, None)
    assert watched == tmp_path / "runs" / ".targets"
    own = run / "monitoring" / "targets.json"
    dead = targets.watched_file(tmp_path / "runs" / "dead" / "monitoring" / "targets.json", watched)
    group = targets.target_group("127.0.0.1:9", run="movi", attempt=1, node="node0", rank=0)
    listing = targets.Listing(own, [group], None, pytest.fail)
    deadline = time.monotonic() + PATIENCE
    while not (active := get(port, "targets?state=active")["activeTargets"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert active[0]["labels"]["run"] == "movi"
    listing.close()
    while dead.exists():  # it died before the monitor began
        assert time.monotonic() < deadline
        time.sleep(0.1)
    names = {rule["name"] for group in get(port, "rules")["groups"] for rule in group["rules"]}
    assert "SlotstreamStalled" in names and "run:slotstream_frames:rate5m" in names
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "Prometheus ended with it"


def test_a_taken_port_is_one_line(monitor: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    other = start(tmp_path / "others", monitor[1])
    out, err = other.communicate(timeout=PATIENCE)
    assert other.returncode == 2 and not out
    assert len(err.splitlines()) == 1 and "port" in err and "Traceback" not in err


def test_runs_without_a_monitor_list_themselves_nowhere_else(tmp_path: Path) -> None:
    assert targets.watched_folder(tmp_path / "runs" / "a", None) is None
    assert targets.watched_folder(tmp_path / "runs" / "a", "elsewhere") == Path("elsewhere")


def test_the_configuration_is_ours_with_absolute_paths(tmp_path: Path) -> None:
    text = render_config(tmp_path)
    assert f"- {tmp_path}/.targets/*.json" in text and "- rules/" not in text and "cluster/monitoring/rules/*.yml" in text


def test_grafana_is_found_under_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_grafana() is None
    for name, words in (("grafana-server", []), ("grafana", ["server"])):  # the newer name wins
        (tmp_path / name).touch(0o755)
        assert find_grafana() == [str(tmp_path / name), *words]
