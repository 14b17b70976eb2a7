"""The run report: `report/index.html`, one file that needs nothing else, and the pictures beside it as PNG.

Comes in: a run folder and the videos to show. Goes out: a page with scores beside their baselines, curves, pictures,
configuration and provenance. It reads only what the run folder holds, so it can be written again at any time, by hand too:
`write_report(Path("runs/demo"))`.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from data_pipeline.files import write_atomically
from trainer.observe.console import data_wait_share, format_seconds
from trainer.observe.curves import legend, line_chart
from trainer.observe.render import GalleryItem, render_item
from trainer.observe.run_log import iterate_keys, latest, read_log, series
from trainer.observe.score_table import ScoreTable, percent, score_table

_PAGE = Path(__file__).with_name("report.html")
_HEADLINE = (("metric/video_fg_ari", "video FG-ARI"), ("metric/video_mbo", "video mBO"))


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind, read once. A file that is not there reads as empty."""

    path: Path
    lines: list[dict[str, Any]]
    config: str
    provenance: Mapping[str, Any]
    done: bool
    attempts: int


def write_report(run_dir: Path | str, gallery: Sequence[GalleryItem] = ()) -> Path:
    """Write `<run_dir>/report/index.html` and one PNG for each video of `gallery`; return the page's path.

    Without a gallery the pictures of an earlier report are shown again.
    """
    run = read_run(Path(run_dir))
    pictures = _save_pictures(run.path / "report", gallery)
    scores = score_table(latest(run.lines, ("metric/", "baseline/")))
    page = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        name=escape(run.path.name),
        state=_state(run),
        facts=_facts(run),
        scores=_score_section(scores),
        curves=_curve_section(run.lines),
        gallery=_gallery_section(pictures, gallery),
        config=_config_section(run.config),
        provenance=_provenance_section(run.provenance),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    index = run.path / "report" / "index.html"
    write_atomically(index, page.encode())
    return index


def read_run(run_dir: Path) -> RunFolder:
    """Everything of a run folder that a report shows."""
    config = run_dir / "config.yaml"
    return RunFolder(
        path=run_dir.absolute(),
        lines=read_log(run_dir / "metrics.jsonl"),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        provenance=_read_json(run_dir / "provenance.json"),
        done=(run_dir / "DONE").exists(),
        attempts=sum(path.is_dir() for path in run_dir.glob("attempts/*")),
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a report that lacks its provenance is better than none
        return {}
    return content if isinstance(content, dict) else {"content": content}


def _save_pictures(folder: Path, gallery: Sequence[GalleryItem]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    if not gallery:
        return sorted(folder.glob("video_*.png"))
    for stale in folder.glob("video_*.png"):
        stale.unlink()
    paths = []
    for number, item in enumerate(gallery):
        buffer = BytesIO()
        render_item(item).save(buffer, "PNG", optimize=True)
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in item.key)[:80]
        paths.append(folder / f"video_{number:02d}_{name}.png")
        write_atomically(paths[-1], buffer.getvalue())
    return paths


def _state(run: RunFolder) -> str:
    steps = [line["step"] for line in run.lines]
    words = "finished" if run.done else "not finished"
    return f"{words}, {max(steps):,} updates" if steps else f"{words}, nothing logged yet"


def _facts(run: RunFolder) -> str:
    """A handful of numbers that answer the first question of whoever opens the page."""
    values = latest(run.lines, ("metric/", "speed/", "loss/", "time/", "mem/"))
    facts = [(label, f"{percent(values[key])} %") for key, label in _HEADLINE if key in values]
    if "loss/total" in values:
        facts.append(("last loss", f"{values['loss/total']:.4g}"))
    speed = series(run.lines, "speed/clips_per_s")
    if speed:
        facts.append(("clips per second", f"{_median([value for _, value in speed]):.3g}"))
    shares = [share for share in map(data_wait_share, run.lines) if share is not None]
    if shares:
        facts.append(("waiting for data", f"{100 * _median(shares):.0f} %"))
    times = [line["time"] for line in run.lines if isinstance(line.get("time"), int | float)]
    if len(times) > 1:
        facts.append(("first to last log line", format_seconds(max(times) - min(times))))
    if run.attempts > 1:
        facts.append(("attempts", str(run.attempts)))
    return "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)


def _score_section(table: ScoreTable) -> str:
    if not table.rows:
        return '<p class="empty">No evaluation was logged.</p>'
    best = [_best(table, column) for column in range(len(table.columns))]
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for number, (name, values) in enumerate(table.rows):
        kind = "model" if number < table.num_model_rows else "first baseline" if number == table.num_model_rows else "baseline"
        cells = "".join(_score_cell(value, value is not None and value == best[place]) for place, value in enumerate(values))
        rows.append(f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{cells}</tr>')
    note = "Percent, higher is better. Baselines are scored on the same videos; the best but the ceiling is bold."
    return (
        f'<p class="note">{note}</p>'
        '<div class="scroll" role="region" aria-label="Scores" tabindex="0"><table class="scores">'
        f'<thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _score_cell(value: float | None, best: bool) -> str:
    share = 0.0 if value is None or not math.isfinite(value) else min(1.0, max(0.0, value))
    text = f"<b>{percent(value)}</b>" if best else percent(value)
    return f'<td style="--share:{100 * share:.1f}%">{text}</td>'


def _best(table: ScoreTable, column: int) -> float | None:
    """The ceiling is what a perfect labelling of patches would get: a bound, not a competitor."""
    values = [row[column] for name, row in table.rows if not name.startswith("ceiling")]
    return max((value for value in values if value is not None and math.isfinite(value)), default=None)


def _curve_section(lines: list[dict[str, Any]]) -> str:
    terms = [key for key in iterate_keys(lines, "loss/") if key != "loss/total"]
    scores = [key for key in iterate_keys(lines, "metric/") if key.endswith(("_fg_ari", "_mbo"))]
    first = [key for key in scores if key.startswith(("metric/video_", "metric/frame_"))]
    others = [key for key in scores if key not in first]
    waits = [(line["step"], share) for line in lines if (share := data_wait_share(line)) is not None]
    charts = [
        _chart("Loss", [("total", series(lines, "loss/total"))]),
        _chart("Loss terms, before weighting", [(_words(key), series(lines, key)) for key in terms]),
        _score_chart("Validation scores", lines, first),
        _score_chart("Validation scores of the other maps", lines, others),
        _chart("Learning rate", [("learning rate", series(lines, "optim/lr"))], "", True),
        _chart("Gradient norm, before clipping", [("gradient norm", series(lines, "optim/grad_norm"))]),
        _chart("Speed", [("clips per second", series(lines, "speed/clips_per_s"))], "clips/s", True),
        _chart("Share of time spent waiting for data", [("data wait", _as_percent(waits))], "%", True),
        _chart("Peak memory", [("peak", series(lines, "mem/peak_gib"))], "GiB", True),
    ]
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else '<p class="empty">No step was logged.</p>'


def _score_chart(title: str, lines: list[dict[str, Any]], keys: list[str]) -> str:
    return _chart(title, [(_words(key), _as_percent(series(lines, key))) for key in keys], "%", from_zero=True)


def _chart(title: str, lines: list[tuple[str, list[tuple[int, float]]]], unit: str = "", from_zero: bool = False) -> str:
    lines = [(name, points) for name, points in lines if any(math.isfinite(value) for _, value in points)]
    picture = line_chart(title, lines, from_zero)
    if not picture:
        return ""
    names = legend([name for name, _ in lines]) if len(lines) > 1 else ""
    caption = escape(title) + (f"<span>, {escape(unit)}</span>" if unit else "")
    return f"<figure><figcaption>{caption}</figcaption>{picture}{names}</figure>"


def _gallery_section(pictures: list[Path], gallery: Sequence[GalleryItem]) -> str:
    if not pictures:
        return '<p class="empty">No pictures: the run had no validation video to show.</p>'
    shown = [(item.key, _score_words(item.scores)) for item in gallery] or [(path.stem[9:], "") for path in pictures]
    return "".join(_picture(path, key, words) for path, (key, words) in zip(pictures, shown, strict=True))


def _picture(path: Path, key: str, words: str) -> str:
    alt = f"Video {key}: rows of frames, truth, attention and object maps before and after merging, boundary and interior sets"
    caption = f"<b>{escape(key)}</b>{' · ' if words else ''}{escape(words)}"
    image = f'<img loading="lazy" alt="{escape(alt)}" src="data:image/jpeg;base64,{_embedded(path)}">'
    label = escape(f"Pictures of video {key}")
    scroll = f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{image}</div>'
    return f'<figure class="video"><figcaption>{caption}</figcaption>{scroll}</figure>'


def _embedded(path: Path) -> str:
    """The picture as base64 JPEG: a quarter of the PNG's bytes, and the exact PNG lies beside the page."""
    buffer = BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


def _score_words(scores: Mapping[str, float | None]) -> str:
    named = score_table({f"metric/{key.removeprefix('metric/')}": value for key, value in scores.items() if value is not None})
    pairs = [(name, column, value) for name, row in named.rows for column, value in zip(named.columns, row, strict=True)]
    return ", ".join(
        f"{column}{name.removeprefix('model')} {percent(value)} %" for name, column, value in pairs if value is not None
    )


def _config_section(config: str) -> str:
    return f"<pre>{escape(config)}</pre>" if config else '<p class="empty">config.yaml is not in the run folder.</p>'


def _provenance_section(provenance: Mapping[str, Any]) -> str:
    if not provenance:
        return '<p class="empty">provenance.json is not in the run folder.</p>'
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>' for key, text in _flatten(provenance))
    return f'<table class="facts">{rows}</table>'


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat.append((f"{prefix}{key}", " ".join(str(item) for item in value)))
        else:
            flat.append((f"{prefix}{key}", str(value)))
    return flat


def _as_percent(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, 100 * value) for step, value in points]


def _words(key: str) -> str:
    name = key.split("/", 1)[1].replace("_", " ")
    return name.replace("fg ari", "FG-ARI").replace("mbo", "mBO").replace("miou", "mIoU")


def _median(values: Sequence[float]) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan


__all__ = ["GalleryItem", "RunFolder", "read_run", "write_report"]
