"""A disk that takes no more: what a rank drops, what ends it, and the exit code it leaves with."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.compose import run_command
from data_pipeline.config import DataConfig
from data_pipeline.errors import StorageError
from data_pipeline.order import World
from trainer.config import ObserveConfig, RunConfig
from trainer.observe.observer import Observer
from trainer.observe.run_log import RunLog, read_log

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def room_for(more: int, path: Path) -> Iterator[None]:
    """No file of this process may grow past `more` bytes beyond the size of `path`: a disk that needs no rights to be full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 10])
def test_a_line_that_did_not_fit_leaves_nothing_to_which_the_next_would_stick(tmp_path: Path, room: int):
    path = tmp_path / "log"
    with RunLog(path) as log:
        log.write(1, {"a": 1.0})
        with room_for(room, path):
            for _ in range(2):
                with pytest.raises(
                    StorageError, match=rf"a line of {path} could not be written: .*; free space or mend the folder$"
                ):
                    log.write(2, {"a": 2.0})
        log.write(3, {"a": 3.0})
    assert path.read_bytes().count(b"\n") == 2 and [line["step"] for line in read_log(path)] == [1, 3]


@pytest.fixture
def observer(tmp_path: Path) -> Iterator[Observer]:
    """Of rank 0, its two logs open."""
    data, observe = DataConfig(root="x", features="patch"), ObserveConfig(metrics=False, report=False)
    found = Observer(RunConfig(data=data, observe=observe), World(rank=0, size=1), tmp_path, attempt=1)
    found.log, found.order = RunLog(tmp_path / "metrics.jsonl"), RunLog(tmp_path / "order" / "rank0.jsonl")
    yield found
    found.close()


def test_lines_of_metrics_are_dropped_which_is_said_once(observer: Observer, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    observer.console.stream = stream = io.StringIO()
    for first in (1, 5):
        observer.saved(first, 10, 0.1, 0.0)
        with room_for(5, path):
            observer.save_failed(first + 1, "the disk is full", 1)
            observer.saved(first + 2, 10, 0.1, 0.0)
        observer.saved(first + 3, 10, 0.1, 0.0)
    assert [line["step"] for line in read_log(path)] == [1, 4, 5, 8]
    said = stream.getvalue().splitlines()
    assert len(said) == 6
    for refused, failed, again in (said[:3], said[3:]):
        assert refused.startswith(f"warning: a line of {path} could not be written: ") and "lines are dropped" in refused
        assert failed == "warning: the disk is full (1 in a row)" and again == f"{path} can be written again; 2 lines of it lost"


def test_the_sizes_of_an_attempt_stand_in_the_first_line_that_is_written(observer: Observer, tmp_path: Path) -> None:
    observer._sizes = {"model/parameters": 7}
    observer._steps = 1
    report = SimpleNamespace(total=1.0, terms={})
    engine = SimpleNamespace(grad_norm=lambda: 1.0)
    with room_for(5, tmp_path / "metrics.jsonl"):
        observer._logged(1, report, 0.1, engine, 0)  # type: ignore[arg-type]
    for step in (2, 3):
        observer._logged(step, report, 0.1, engine, 0)  # type: ignore[arg-type]
    assert [(line["step"], "model/parameters" in line) for line in read_log(tmp_path / "metrics.jsonl")] == [
        (2, True),
        (3, False),
    ]


def test_a_record_of_the_order_with_a_gap_is_none(observer: Observer, tmp_path: Path) -> None:
    one = {"sample_ids": (3,), "keys": ("clip",), "starts": (0,), "positions": (5,)}
    batch = ClipBatch(features=torch.zeros(1, 1, 1, 1), grid=(1, 1), num_real=1, **one)
    observer.stepping(1, batch)
    path = tmp_path / "order" / "rank0.jsonl"
    with room_for(5, path), pytest.raises(StorageError, match="rank0.jsonl could not be written"):
        observer.stepping(2, batch)
    assert [line["step"] for line in read_log(path)] == [1]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, 74) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)),
        *((number, 2) for number in (errno.ENOENT, errno.EACCES, errno.ENOTDIR)),
    ],
)
def test_what_a_disk_says_is_told_from_a_wrong_place(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise OSError(number, os.strerror(number), "place")

    assert run_command(main, []) == code
    assert capsys.readouterr().err.startswith(f"error: {os.strerror(number)} (place); check ")


RANK = """
import errno, sys
from data_pipeline.errors import ConfigError, StateError, StorageError
from trainer.observe.console import Console
from trainer.process import run_as_rank

def main(argv):
    print("on stdout")
    Console(1).note("on stderr")
    {ending}

run_as_rank(main)
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("return 0", 0),
        ("return 75", 75),
        ("sys.exit(75)", 75),
        ("raise StorageError('no room')", 74),
        ("raise OSError(errno.ENOSPC, 'no room')", 74),
        ("raise ConfigError('wrong')", 2),
        ("raise KeyboardInterrupt", 130),
        ("raise StateError('damaged')", 1),
        ("raise RuntimeError('broken pipe')", 1),
    ],
)
def test_an_exit_code_survives_outputs_on_a_full_disk(ending: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        command, buffered = [sys.executable, "-c", RANK.format(ending=ending)], {**os.environ, "PYTHONUNBUFFERED": ""}
        assert subprocess.run(command, cwd=ROOT, env=buffered, stdout=full, stderr=full, check=False).returncode == code
