"""What a run left behind, read once. Comes in: a run folder. Goes out: RunFolder, whose missing parts are empty.

Files of the launcher (events.jsonl, attempts/<n>/verdict.json, hang.json) are read as files: the trainer does not know it.
A damaged file becomes a line in `problems`; a report that lacks a part is better than none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.errors import DataError
from trainer.observe.run_log import read_log
from trainer.report.events import describe

SILENT_AFTER_S = 60.0  # without a beat of its launcher, or a line in its log, a run does not count as alive
MARKS = ("config.yaml", "provenance.json", "metrics.jsonl", "events.jsonl", "attempts", "checkpoints")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A file that is not there reads as empty. Units: times in seconds since 1970."""

    path: Path
    lines: list[dict[str, Any]]  # metrics.jsonl
    config_text: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    events: list[dict[str, Any]]  # each has "event" and "time"
    attempts: dict[int, dict[str, Mapping[str, Any]]]  # number -> {"verdict", "hang", "provenance", "launch"}
    state: Mapping[str, Any]  # state.json of the newest checkpoint
    evaluation: Mapping[str, Any]  # evaluation.json of python -m trainer.evaluate
    done: bool
    owner_beat: float | None  # when the launcher that holds the folder gave its last sign of life
    problems: list[str]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def last_step(self) -> int | None:
        return max((line["step"] for line in self.lines), default=None)

    @property
    def log_times(self) -> list[float]:
        return [float(line["time"]) for line in self.lines if isinstance(line.get("time"), int | float)]

    @property
    def last_session(self) -> list[dict[str, Any]]:
        """Events since the newest launch."""
        begun = [place for place, event in enumerate(self.events) if event["event"] == "session"]
        return self.events[begun[-1] :] if begun else self.events


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in MARKS)


def read_run(run_dir: Path) -> RunFolder:
    """Everything of a run folder that a report shows. Never raises for what is in it."""
    problems: list[str] = []
    text = _text(run_dir / "config.yaml", problems)
    return RunFolder(
        path=run_dir.absolute(),
        lines=_log(run_dir / "metrics.jsonl", problems),
        config_text=text,
        config=_yaml(text, problems),
        provenance=_json(run_dir / "provenance.json", problems),
        events=_events(run_dir / "events.jsonl"),
        attempts=_attempts(run_dir / "attempts", problems),
        state=_newest_state(run_dir / "checkpoints", problems),
        evaluation=_json(run_dir / "evaluation.json", problems),
        done=(run_dir / "DONE").exists(),
        owner_beat=_modified(run_dir / "owner.json"),
        problems=problems,
    )


def state_of(run: RunFolder, now: float | None = None) -> tuple[str, str]:
    """How the run stands, as (one of finished, failed, stopped, running, lost, new; a few words about it)."""
    now = time.time() if now is None else now
    if run.done:
        return "finished", "finished"
    if not run.lines and not run.events and not run.attempts:
        return "new", "not started"
    verdict: Mapping[str, Any] = next((event for event in reversed(run.last_session) if event["event"] == "verdict"), {})
    end = next((event for event in reversed(run.last_session) if event["event"] == "end"), None)
    if end is not None:
        if verdict.get("outcome") == "failed":
            return "failed", describe(verdict)
        return ("failed", f"failed: {describe(end)}") if end.get("code") in (1, 2) else ("stopped", "stopped before its end")
    signs = [*run.log_times[-1:], *([run.owner_beat] if run.owner_beat else []), *(event["time"] for event in run.events[-1:])]
    if signs and now - max(signs) < SILENT_AFTER_S:
        return "running", "still going"
    return "lost", "not finished, and no longer going"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return ""


def _json(path: Path, problems: list[str]) -> Mapping[str, Any]:
    text = _text(path, problems)
    try:
        content = json.loads(text) if text else {}
    except ValueError:
        problems.append(f"{path.parent.name}/{path.name} is not JSON; it is left out")
        return {}
    return content if isinstance(content, dict) else {"content": content}


def _yaml(text: str, problems: list[str]) -> Mapping[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text)) if text else {}
    except (OmegaConfBaseException, ValueError, OSError, AttributeError):
        content = None
    except Exception as error:  # yaml's own errors, whose package is not ours to import
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        content = None
    if isinstance(content, dict):
        return {str(key): value for key, value in content.items()}
    problems.append("config.yaml is not a mapping of settings; it is shown as it is")
    return {}


def _log(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        return read_log(path)
    except (DataError, OSError) as error:
        problems.append(f"the run log cannot be read: {error}")
        return []


def _events(path: Path) -> list[dict[str, Any]]:
    """The training's; a scoring beside it writes there, too."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for text in texts:
        try:
            event = json.loads(text)
        except ValueError:  # a line cut short by a full disk
            continue
        if not isinstance(event, dict) or event.get("job", "train") != "train":
            continue
        if isinstance(event.get("event"), str) and _is_number(event.get("time")):
            found.append(event)
    return sorted(found, key=lambda event: event["time"])


def _attempts(folder: Path, problems: list[str]) -> dict[int, dict[str, Mapping[str, Any]]]:
    numbers = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())
    files = ("verdict", "hang", "provenance", "launch")
    return {number: {name: _json(folder / str(number) / f"{name}.json", problems) for name in files} for number in numbers}


def _newest_state(folder: Path, problems: list[str]) -> Mapping[str, Any]:
    whole = [path for path in sorted(folder.glob("step_*")) if (path / "manifest.json").exists()]
    return _json(whole[-1] / "state.json", problems) if whole else {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
