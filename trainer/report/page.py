"""The page of one run: `report/index.html`, one file that needs nothing else, and the pictures beside it as PNG.

Comes in: a run folder and the videos to show. Goes out: a page with scores beside their baselines, pictures, curves, times,
memory, data, faults, configuration and provenance. It reads only what the run folder holds, so it can be written again at any
time, also of a run that is still going or that crashed: `python -m trainer.report runs/demo`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from data_pipeline.files import write_atomically
from trainer.observe.console import data_wait_share, format_seconds
from trainer.observe.run_log import latest, series
from trainer.report import colours
from trainer.report.charts import memory_charts, training_charts
from trainer.report.data_use import data_section
from trainer.report.gallery import gallery_section, load_gallery, save_gallery
from trainer.report.parts import facts, fold, fold_text, missing, numbers, section
from trainer.report.render import GalleryItem
from trainer.report.run import RunFolder, flatten, read_run, state_of
from trainer.report.score_table import percent
from trainer.report.scores import score_section
from trainer.report.time_use import time_section
from trainer.report.timeline import timeline_section

_PAGE = Path(__file__).with_name("page.html")
_HEADLINE = (("metric/video_fg_ari", "video FG-ARI"), ("metric/video_mbo", "video mBO"))
_FIRST = ("command", "commit", "uncommitted_changes", "started", "host", "world_size", "seed")  # of the provenance, always seen


def write_report(run_dir: Path | str, gallery: Sequence[GalleryItem] = (), out: Path | None = None) -> Path:
    """Write the page of a run to `out` (default `<run_dir>/report/index.html`); return its path.

    `gallery` replaces the videos stored in `<run_dir>/report`; without one, those of an earlier report are shown again.
    """
    run = read_run(Path(run_dir))
    folder = run.path / "report"
    items = save_gallery(folder, gallery) if gallery else load_gallery(folder, run.problems)
    index = out or folder / "index.html"
    write_atomically(index, run_page(run, items).encode())
    return index


def run_page(run: RunFolder, items: Sequence[GalleryItem]) -> str:
    sections = [
        section("scores", "Scores", score_section(run)),
        section("pictures", "What the slots see", gallery_section(items)),
        section("curves", "Training", training_charts(run.lines)),
        section("times", "Where the time went", time_section(run.lines)),
        section("memory", "Memory", memory_section(run)),
        section("data", "Data", data_section(run)),
        section("timeline", "Faults and restarts", timeline_section(run)),
        section("run", "How it was made", provenance_section(run) + config_section(run)),
    ]
    lines = "".join(f'<p class="problem">{escape(text)}</p>' for text in run.problems)
    return fill_page(run.name, f"Slotstream run, {state_words(run)}", lines + numbers(headline(run)), sections)


def fill_page(title: str, state: str, head: str, sections: Sequence[str]) -> str:
    """A whole page around its parts. `title` and `state` are text, `head` and `sections` HTML."""
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        state=escape(state),
        colours=colours.css(),
        head=head,
        sections="".join(sections),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def state_words(run: RunFolder) -> str:
    words = state_of(run)[1]
    goal = flatten(run.config).get("optim.max_steps")
    if run.last_step is None:
        return f"{words}, nothing logged yet"
    of = f" of {goal:,}" if isinstance(goal, int) and goal > run.last_step else ""
    return f"{words}, {run.last_step:,}{of} updates"


def headline(run: RunFolder) -> list[tuple[str, str]]:
    """A handful of numbers that answer the first question of whoever opens the page."""
    values = latest(run.lines, ("metric/", "speed/", "loss/", "time/", "mem/"))
    found = [(label, f"{percent(values[key])} %") for key, label in _HEADLINE if key in values]
    if "loss/total" in values:
        found.append(("last loss", f"{values['loss/total']:.4g}"))
    speed = [value for _, value in series(run.lines, "speed/clips_per_s")]
    if speed:
        found.append(("clips per second", f"{_median(speed):.3g}"))
    shares = [share for share in map(data_wait_share, run.lines) if share is not None]
    if shares:
        found.append(("waiting for data", f"{100 * _median(shares):.0f} %"))
    if "mem/peak_gib" in values:
        found.append(("peak memory", f"{values['mem/peak_gib']:.3g} GiB"))
    if len(run.log_times) > 1:
        found.append(("first to last log line", format_seconds(max(run.log_times) - min(run.log_times))))
    if len(run.attempts) > 1:
        found.append(("attempts", str(len(run.attempts))))
    return found


def memory_section(run: RunFolder) -> str:
    values = latest(run.lines, ("mem/", "checkpoint/"))
    rows = []
    if "mem/peak_gib" in values:
        where = "its GPU where it uses one, else resident on the host"
        rows.append(("most at once, rank 0", f"{values['mem/peak_gib']:.3f} GiB ({where})"))
    if "checkpoint/bytes" in values:
        rows.append(("a checkpoint on disk", f"{values['checkpoint/bytes'] / 2**20:,.1f} MiB"))
    return facts(rows) + memory_charts(run.lines)


def config_section(run: RunFolder) -> str:
    if not run.config_text:
        return missing("config.yaml is not in the run folder.")
    return fold_text("Configuration", run.config_text)


def provenance_section(run: RunFolder) -> str:
    if not run.provenance:
        return missing("provenance.json is not in the run folder.")
    flat = {key: _shown(value) for key, value in flatten(run.provenance).items()}
    first = facts((key.replace("_", " "), flat[key]) for key in _FIRST if flat.get(key, ""))
    rest = facts((key, value) for key, value in flat.items() if key not in _FIRST)
    return first + (fold("Versions and platform", rest) if rest else "")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _median(values: Sequence[float]) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan


__all__ = ["GalleryItem", "fill_page", "read_run", "run_page", "write_report"]
