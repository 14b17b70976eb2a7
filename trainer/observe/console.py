"""What the user sees while a run works: one bar in a terminal, plain lines with a small bar elsewhere, a summary at the end.

Comes in: a step and the values of its run-log line. Goes out: text on stderr (or the given stream). Only rank 0 passes
`enabled=True`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from trainer.observe.totals import Totals
from trainer.report.score_table import percent, score_table

if TYPE_CHECKING:
    from rich.progress import Progress

_SHORT = {
    "feature_reconstruction": "rec",
    "slot_contrast": "contrast",
    "ssync_boundary": "bound",
    "ssync_interior": "inter",
    "srl_decoder": "dec",
    "srl_encoder": "enc",
    "srl_regulariser": "reg",
}
_PLAIN_BAR_WIDTH = 20
_BAR_WIDTH = 16
_REFRESH_S = 0.25  # drawing the bar takes milliseconds
_LEAST_WANTED = ("terms", "wait", "restarts", "speed")  # what a narrow terminal goes without, in this order


class Console:
    """Progress of a run. In a terminal the bar stays on the last line; elsewhere every update is a line of its own."""

    def __init__(
        self,
        total_steps: int,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        restarts: int = 0,
    ) -> None:
        """`restarts`: attempts of this run before this one."""
        self.total_steps = total_steps
        self.restarts = restarts
        self.enabled = enabled
        self.stream = stream or sys.stderr
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step) of the last updates: ETA without the start-up
        self._totals, self._began, self._drawn = Totals(), clock(), float("-inf")
        self._bar: Progress | None = _rich_bar(total_steps, self.stream) if enabled and self.stream.isatty() else None

    def start(self, step: int = 0) -> None:
        """The clock of the ETA runs from here; `step` = updates already done, for example by an earlier attempt."""
        self._recent.clear()
        self._began = self._clock()
        self._recent.append((self._began, step))
        self._totals.begin(step)
        if self._bar is not None:
            self._bar.start()
            self._draw(step, "")

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show `step` with its loss and terms, clips/s, share of time spent waiting for data, restarts, and time to go."""
        if not self.enabled:
            return
        if not self._recent:
            self.start(step)
        self._totals.add(step, values)
        words = progress_words(values) | ({"restarts": counted(self.restarts, "restart")} if self.restarts else {})
        words["eta"] = f"{format_seconds(self._eta(step))} to go"
        if self._bar is not None:
            taken = _BAR_WIDTH + 2 * len(str(self.total_steps)) + 4
            self._draw(step, " · ".join(fitting(words, self._bar.console.width - taken)))
        else:
            width = len(str(self.total_steps))
            line = f"{_plain_bar(step, self.total_steps)} step {step:>{width}}/{self.total_steps}"
            self._write(f"{line}  {' · '.join(words.values())}")
        self._recent.append((self._clock(), step))

    def note(self, text: str) -> None:
        """Print a line of text above the bar."""
        if self.enabled:
            self._write(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
        """Print an aligned table; also returned, so that a log can hold it."""
        text = format_table(title, columns, rows)
        if self.enabled:
            self._write(f"\n{text}\n")
        return text

    def score_table(self, values: Mapping[str, float], title: str = "scores in %") -> str:
        """Print the model's scores with the baselines under them; `values` holds `metric/...` and `baseline/...` keys."""
        table = score_table(values)
        return self.table(title, ["", *table.columns], table.cells())

    def summary(self, title: str, more: Sequence[tuple[str, str]] = ()) -> None:
        """The end of a run: what it did in this attempt, and `more` rows of what is where."""
        done, took = self._totals.last - self._totals.first, format_seconds(self._clock() - self._began)
        before = f" behind {self._totals.first:,} of earlier attempts" if self._totals.first else ""
        again = f", {counted(self.restarts, 'restart')}" if self.restarts else ""
        losses = progress_words(self._totals.values)
        shown = [("loss", " · ".join(losses[name].removeprefix("loss ") for name in ("loss", "terms") if name in losses))]
        rows = [("updates", f"{done:,}{before} in {took}{again}"), *shown, *self._totals.rows(), *more]
        if self.enabled:
            self._write("\n".join([f"\n{title}", *(f"  {name:<8} {text}" for name, text in rows if text), ""]))

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # as in _draw
                self._bar.stop()

    def _eta(self, step: int) -> float | None:
        then, first = self._recent[0]
        done = step - first
        return (self._clock() - then) / done * (self.total_steps - step) if done > 0 else None

    def _draw(self, step: int, text: str) -> None:
        assert self._bar is not None
        now = self._clock()
        if due := now - self._drawn > _REFRESH_S:
            self._drawn = now
        with contextlib.suppress(OSError):  # a terminal that is gone
            self._bar.update(self._bar.task_ids[0], completed=step, text=text, refresh=due)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk under the output ends no run, nor changes its exit code
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self.stream.write(text + "\n")
                self.stream.flush()


def progress_words(values: Mapping[str, Any]) -> dict[str, str]:
    """The few words of a progress line by what they tell, from run-log keys; what is absent is left out."""
    words = {"loss": f"loss {values['loss/total']:.4g}"} if "loss/total" in values else {}
    terms = {key[5:]: value for key, value in values.items() if key.startswith("loss/") and key != "loss/total"}
    if terms:
        words["terms"] = " ".join(f"{_SHORT.get(name, name)} {value:.4g}" for name, value in terms.items())
    if "speed/clips_per_s" in values:
        words["speed"] = f"{values['speed/clips_per_s']:.3g} clips/s"
    share = data_wait_share(values)
    if share is not None:
        words["wait"] = f"data wait {100 * share:.0f} %"
    return words


def fitting(words: Mapping[str, str], width: int) -> list[str]:
    """The words that fit into so many columns with " · " between them, the least wanted left out first."""
    kept = dict(words)
    for name in _LEAST_WANTED:
        if len(" · ".join(kept.values())) > width:
            kept.pop(name, None)
    return list(kept.values())


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def data_wait_share(values: Mapping[str, Any]) -> float | None:
    """Share of a step's time in which it waited for data, in [0, 1]; None where the line does not say."""
    if "time/data_wait_share" in values:
        return float(values["time/data_wait_share"])
    step_ms = values.get("time/step_ms")
    return float(values["time/data_wait_ms"]) / step_ms if step_ms and "time/data_wait_ms" in values else None


def format_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text: title, header, rule, rows; the first column left-aligned, the others right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    lines = [title] if title else []
    for number, row in enumerate([list(columns), *cells]):
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip())
        if number == 0:
            lines.append("─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def format_seconds(seconds: float | None) -> str:
    """1:02:03, 4:05 or "?"."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain_bar(step: int, total: int) -> str:
    share = min(1.0, step / total) if total else 1.0
    full = int(share * _PLAIN_BAR_WIDTH)
    return f"[{'#' * full}{'.' * (_PLAIN_BAR_WIDTH - full)}] {100 * share:3.0f} %"


def _rich_bar(total_steps: int, stream: TextIO) -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        BarColumn(bar_width=_BAR_WIDTH),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        console=RichConsole(file=stream),
        auto_refresh=False,  # a thread that draws would take time from the steps
    )
    bar.add_task("train", total=total_steps, text="")
    return bar


__all__ = ["Console", "counted", "data_wait_share", "format_seconds", "format_table", "percent", "progress_words"]
