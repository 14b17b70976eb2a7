"""A run whose own logs the disk takes no more while it has room for the checkpoints."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.ranks import ROOT
from tests.integration.tiny_run import arguments, make_shards

SPARE = 3_000  # bytes that a log may be longer than the largest file of a checkpoint


def train(words: list[str], limit: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """One rank of which no file may grow past `limit` bytes."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


@pytest.mark.parametrize(("record", "code"), [("false", 0), ("true", 74)])
def test_lost_metrics_do_not_end_a_run_and_a_lost_record_of_the_order_does(tmp_path: Path, record: str, code: int) -> None:
    data = make_shards(tmp_path / "data")
    assert train(arguments(data, tmp_path, "short", "optim.max_steps=1")).returncode == 0
    limit = SPARE + max(path.stat().st_size for path in tmp_path.glob("short/checkpoints/*/*"))
    more = [f"observe.record_order={record}", "optim.max_steps=200", "checkpoint.every_steps=50"]
    log = tmp_path / "long" / ("order/rank0.jsonl" if code else "metrics.jsonl")
    log.parent.mkdir(parents=True)
    line = json.dumps({"step": 0, "text": "x" * 100}) + "\n"
    earlier = (limit - SPARE) // len(line)  # an earlier attempt has nearly filled it
    log.write_text(line * earlier)
    result = train(arguments(data, tmp_path, "long", *more), limit)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "long" / "DONE").is_file() == (code == 0)
    found = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert earlier < len(found) < earlier + 200 and log.stat().st_size <= limit
    said = "error: " if code else "warning: "
    assert f"{said}a line of {log} could not be written" in result.stderr
