"""A profile of a few updates of a run: asked for by observe.profile, or while it runs by a file, without stopping it.

Comes in: `steps[a:b]`, or the words of `<run>/profile/request` (`steps=20`, `steps[a:b]`, `ranks=all`), which
`cluster/launch.py profile` writes. Goes out: for each profiled rank, in `<run>/profile/`, a trace (chrome's JSON, gzip), what
memory tensors took, and a table of operators; rank 0 leaves in `last.json` how the last profile ended. Nothing here is
collective or changes a number, and what goes wrong is a warning. No torch import at module level.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import ConfigError, say_error
from data_pipeline.files import write_atomically
from trainer import heartbeat
from trainer.observe.profile_window import parse_request, parse_window

if TYPE_CHECKING:
    from trainer.observe.recording import Recording

LOOK_S = 1.0  # seconds between two looks for a request
KEPT_S = 10.0  # a request to all ranks lies there so long, until each has seen it


class Profiler:
    """Profiles of one rank. Told after each update; idle it looks at the clock, and once a second for a request."""

    def __init__(
        self,
        run: Path,
        rank: int = 0,
        window: str | None = None,
        all_ranks: bool = False,
        *,
        stops_at: Callable[[int], int] = lambda step: sys.maxsize,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stops_at(step)`: the update at which a profile that begins after `step` must end, for example before an evaluation."""
        self.folder, self.rank = run / "profile", rank
        self._windows = [parse_window("observe.profile", window)] if window and (all_ranks or rank == 0) else []
        self._stops_at, self._say, self._clock = stops_at, say, clock
        self._recording: Recording | None = None
        self._look_at, self._seen, self._seen_at = float("-inf"), (0, 0), 0.0

    def stepped(self, step: int) -> bool:
        """`step` updates are done. True where this took a time that is none of the step's."""
        try:
            if self._recording is not None:
                return self._go_on(step, self._recording)
            window = self._due(step)
            if window is not None:
                from trainer.observe.recording import Recording

                self._recording = Recording(step, min(window[1], self._stops_at(step)))
            return window is not None
        except Exception as error:  # whatever it is, it must not end the run
            self._give_up(error)
            return True

    def close(self) -> None:
        """The run ends: write what there is."""
        try:
            if self._recording is not None:
                self._write(self._recording, self._recording.done)
            self._clear_request()
        except Exception as error:
            self._give_up(error)

    # -- when ---------------------------------------------------------------------------------------------------------------

    def _due(self, step: int) -> tuple[int, int] | None:
        """The window that begins here. One whose begin is past, because the run was resumed in it, is taken from here on."""
        self._look(step)
        due = [window for window in self._windows if window[0] <= step]
        self._windows = [window for window in self._windows if step < window[0]]
        return next((window for window in due if step < window[1]), None)

    def _look(self, step: int) -> None:
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        try:
            with open(self.folder / "request", errors="replace") as file:
                about, text = os.fstat(file.fileno()), file.read(1000)
        except OSError:
            return
        identity = (about.st_mtime_ns, about.st_ino)
        if identity == self._seen:
            if now > self._seen_at + KEPT_S:
                self._clear_request()
            return
        self._seen, self._seen_at = identity, now
        self._take(text, step)

    def _take(self, text: str, step: int) -> None:
        try:
            first, last, everyone = parse_request(text, step)
            if last <= step:
                raise ConfigError(f"profile/request: steps[{first}:{last}]; {step} updates are done; ask for later ones")
        except ConfigError as error:
            self._clear_request()
            if self.rank == 0:
                self._fail(str(error))
            return
        if not everyone:
            self._clear_request()
        if everyone or self.rank == 0:
            self._windows.append((first, last))

    def _clear_request(self) -> None:
        """Rank 0 takes away a request that it has seen; one that came later stays."""
        path = self.folder / "request"
        with contextlib.suppress(OSError):
            about = path.stat()
            if self.rank == 0 and (about.st_mtime_ns, about.st_ino) == self._seen:
                path.unlink()

    # -- what ---------------------------------------------------------------------------------------------------------------

    def _go_on(self, step: int, recording: Recording) -> bool:
        if step < recording.last and not recording.fills_memory():
            recording.mark(step)
            return False
        self._write(recording, step)
        return True

    @heartbeat.during("save")  # it may take seconds: to whoever watches for hangs it is a save
    def _write(self, recording: Recording, done: int) -> None:
        """Files of the updates up to `done`; what came after was not finished."""
        if done == recording.first:
            recording.drop()
            self._recording = None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{recording.first:08d}_{done:08d}_rank{self.rank}"
        files = recording.write(self.folder, name)
        self._recording = None
        if self.rank == 0:
            self._tell(steps=[recording.first, done], files=files)
            self._say(f"profile of updates {recording.first} to {done}: {self.folder / files[0]} (open at ui.perfetto.dev)")

    def _give_up(self, error: Exception) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.drop()
        self._fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _fail(self, why: str) -> None:
        say_error(f"warning: rank {self.rank} has no profile: {why}; training goes on")
        with contextlib.suppress(OSError):
            self._tell(error=why)

    def _tell(self, **how: Any) -> None:
        if self.rank == 0:
            write_atomically(self.folder / "last.json", json.dumps({"time": time.time(), **how}))
