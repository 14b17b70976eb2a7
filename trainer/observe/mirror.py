"""Readers of the run log for other programs' pages: metrics.jsonl in, TensorBoard event files or a Weights & Biases run out.

`python -m trainer.observe.mirror run=runs/NAME to=tensorboard [follow=true]`; with `observe.mirror=[tensorboard]` rank 0 follows
its own log while it trains. The log is the truth: a mirror that fails is said once, costs the run nothing and can be made anew.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import ConfigError, say_error, unknown_name

POLL_S = 2.0
HELP = """python -m trainer.observe.mirror run=runs/NAME to=tensorboard|wandb [follow=true] [out=FOLDER] [project=NAME]

Copies a run's metrics.jsonl to TensorBoard (pip install 'slotstream[tensorboard]') or to Weights & Biases ('slotstream[wandb]').

  follow=true    go on until the run is done
  out=FOLDER     where the event files, or the offline run, go (default: runs/NAME/tensorboard, runs/NAME)
  project=NAME   of Weights & Biases (default: slotstream). WANDB_MODE=offline: nothing is sent; wandb sync sends it later
"""


class Mirror(Protocol):
    def write(self, step: int, time: float, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files. A resumed run that takes steps back purges them from the curves."""

    def __init__(self, run: Path, out: Path | None, project: str) -> None:
        with _needs("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._make = lambda step: SummaryWriter(str(out or run / "tensorboard"), purge_step=step)
        self._writer, self._last = self._make(0), -1

    def write(self, step: int, time: float, values: Mapping[str, float]) -> None:
        if step < self._last:
            self._writer.close()
            self._writer = self._make(step)
        self._last = step
        for key, value in values.items():
            self._writer.add_scalar(key, value, step, walltime=time)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One run by the name of the run folder; every attempt goes on in it."""

    def __init__(self, run: Path, out: Path | None, project: str) -> None:
        with _needs("wandb"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wandb
        settings = wandb.Settings(console="off", silent=True)
        place = out or run
        place.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=project, name=run.name, id=run.name, resume="allow", dir=str(place), settings=settings)
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back when a run does

    def write(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


MIRRORS: dict[str, Callable[[Path, Path | None, str], Mirror]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


class _needs:
    """A package that is an extra: one line where it is missing."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ImportError):
            raise ConfigError(
                f"to={self.package}; the package {self.package} is not installed; pip install 'slotstream[{self.package}]'"
            ) from None


def open_mirror(name: str, run: Path, out: Path | None = None, project: str = "slotstream") -> Mirror:
    """Raises ConfigError for an unknown name, or where the package is not installed."""
    if name not in MIRRORS:
        raise unknown_name("to", name, MIRRORS)
    return MIRRORS[name](run, out, project)


class LogTail:
    """The lines of a log that have not been seen yet. A log that was rewritten (a resume took lines back) is another file: it is
    read from its start, and lines that were given before are not given again."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._file = path, 0, -1
        self._given: set[tuple[int, float]] = set()

    def read(self) -> Iterator[tuple[int, float, dict[str, float]]]:
        """(step, seconds since 1970, numbers) of each new line. A line that is being written waits for the next call."""
        try:
            with self._path.open("rb") as file:
                if self._file != (number := os.fstat(file.fileno()).st_ino):
                    self._file, self._offset = number, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                step, time = int(line.pop("step")), float(line.pop("time"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged: the report says so
            if (step, time) in self._given:
                continue
            self._given.add((step, time))
            yield step, time, {key: float(value) for key, value in line.items() if isinstance(value, int | float)}


def copy(tail: LogTail, mirror: Mirror) -> int:
    """Hand on what is new; how many lines that were."""
    count = 0
    for step, time, values in tail.read():
        mirror.write(step, time, values)
        count += 1
    return count


class Follower:
    """Mirrors a run's log from a thread of rank 0 while it trains."""

    def __init__(self, names: list[str], run: Path) -> None:
        self._mirrors = [(LogTail(run / "metrics.jsonl"), open_mirror(name, run)) for name in names]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        for pair in list(self._mirrors):
            try:
                copy(*pair)
            except Exception as error:  # another program's fault must not end a run
                self._mirrors.remove(pair)
                why = f"{type(error).__name__}: {error}"
                again = "python -m trainer.observe.mirror"
                say_error(f"warning: a mirror of metrics.jsonl ended ({why}); training goes on; make it again later with {again}")

    def close(self) -> None:
        """Returns when all that was logged has been handed on."""
        self._stop.set()
        self._thread.join()
        for _, mirror in self._mirrors:
            mirror.close()


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv or not argv:
        print(HELP, end="")
        return 0
    words = dict(_word(word) for word in argv)
    if "run" not in words or "to" not in words:
        raise ConfigError("run= and to= are needed; for example run=runs/demo to=tensorboard; see --help")
    run = Path(words["run"])
    if not (run / "metrics.jsonl").is_file():
        raise ConfigError(f"run={run}; there is no metrics.jsonl in it; give a run folder, for example run=runs/demo")
    out = Path(words["out"]) if "out" in words else None
    mirror = open_mirror(words["to"], run, out, words.get("project", "slotstream"))
    tail, done = LogTail(run / "metrics.jsonl"), threading.Event()
    try:
        count = copy(tail, mirror)
        while words.get("follow") == "true" and not (run / "DONE").exists():
            done.wait(POLL_S)
            count += copy(tail, mirror)
        count += copy(tail, mirror)
    finally:
        mirror.close()
    print(f"{count} lines of {run / 'metrics.jsonl'} to {words['to']}", flush=True)
    return 0


def _word(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or key not in ("run", "to", "follow", "out", "project"):
        raise unknown_name("setting", key, ("run", "to", "follow", "out", "project"))
    if key == "follow" and value not in ("true", "false"):
        raise ConfigError(f"follow={value!r}; true or false is needed; change follow")
    return key, value


if __name__ == "__main__":
    from data_pipeline.compose import run_command

    raise SystemExit(run_command(main))
