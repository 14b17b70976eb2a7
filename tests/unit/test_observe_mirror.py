"""The run log as TensorBoard and Weights & Biases show it, without a network; a mirror never harms a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from trainer.observe import mirror
from trainer.observe.mirror import Follower, LogTail, open_mirror
from trainer.observe.run_log import RunLog

ROOT = Path(__file__).resolve().parents[2]


def write(run: Path, *lines: tuple[int, dict[str, float]], resume: int | None = None) -> None:
    with RunLog(run / "metrics.jsonl", resume_step=resume) as log:
        for step, values in lines:
            log.write(step, values)


def scalars(folder: Path, key: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(key)} if key in events.Tags()["scalars"] else {}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "movi_c"
    write(folder, (1, {"loss/total": 3.0, "note": "text"}), (2, {"loss/total": 2.0, "metric/video_mbo": 0.25}))
    return folder


def test_tensorboard_has_the_numbers_of_the_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mirror.main([f"run={run}", "to=tensorboard"]) == 0
    assert "2 lines" in capsys.readouterr().out
    assert scalars(run / "tensorboard", "loss/total") == {1: 3.0, 2: 2.0}
    assert scalars(run / "tensorboard", "metric/video_mbo") == {2: 0.25}
    assert scalars(run / "tensorboard", "note") == {}


def test_steps_that_a_resume_takes_back_leave_the_curves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "POLL_S", 0.01)
    write(run, (3, {"loss/total": 1.5}))
    tail, board = LogTail(run / "metrics.jsonl"), open_mirror("tensorboard", run)
    assert mirror.copy(tail, board) == 3
    write(run, (2, {"loss/total": 2.5}), (3, {"loss/total": 1.0}), resume=1)  # as long as before, other lines
    mirror.copy(tail, board)
    write(run, (4, {"loss/total": 0.5}))
    mirror.copy(tail, board)
    board.close()
    assert scalars(run / "tensorboard", "loss/total") == {1: 3.0, 2: 2.5, 3: 1.0, 4: 0.5}


def test_a_line_under_way_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = LogTail(path)
    assert list(tail.read()) == []
    path.write_bytes(b'{"step": 1, "time": 1.0, "a": 5}\n{"step": 2, "ti')
    assert list(tail.read()) == [(1, 1.0, {"a": 5.0})]
    with path.open("ab") as file:
        file.write(b'me": 2.0, "a": 6}\nnot json\n')
    assert list(tail.read()) == [(2, 2.0, {"a": 6.0})]


def test_wandb_offline(run: Path) -> None:
    """A process of its own: the library leaves threads and handlers behind."""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(run)}
    command = [sys.executable, "-m", "trainer.observe.mirror", f"run={run}", "to=wandb"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    (record,) = run.glob("wandb/offline-run-*/run-movi_c.wandb")
    assert b"metric/video_mbo" in record.read_bytes()


def test_a_follower_hands_everything_on_and_survives_a_mirror(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen: list[int] = []

    class Sound:
        def write(self, step: int, time: float, values: dict[str, float]) -> None:
            seen.append(step)

        def close(self) -> None:
            seen.append(-1)

    class Broken(Sound):
        def write(self, step: int, time: float, values: dict[str, float]) -> None:
            raise OSError("server away")

    monkeypatch.setattr(mirror, "MIRRORS", {"sound": lambda *_: Sound(), "broken": lambda *_: Broken()})
    follower = Follower(["broken", "sound"], run)
    write(run, (3, {"loss/total": 1.5}))
    follower.close()
    assert seen == [1, 2, 3, -1]
    assert "server away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run=nowhere", "to=tensorboard"], "metrics.jsonl"),
        (["to=wandb"], "run="),
        (["runs=x", "to=wandb"], "did you mean 'run'"),
    ],
)
def test_a_mistake_is_named(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        mirror.main(words)


def test_unknown_and_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensorboard, wandb"):
        open_mirror("tensorbord", run)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'slotstream\[wandb\]'"):
        open_mirror("wandb", run)
