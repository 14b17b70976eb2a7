"""Which curves a page shows. Comes in: one run's log, or several runs' logs by name. Goes out: figures of curves.

Of several runs every chart shows one quantity, a line for each run; of one run related quantities share a chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from trainer.observe.console import data_wait_share
from trainer.observe.run_log import iterate_keys, series
from trainer.report.curves import legend, line_chart
from trainer.report.parts import missing

Lines = list[dict[str, Any]]
Points = list[tuple[int, float]]
Curve = tuple[str, Points]


def training_charts(lines: Lines) -> str:
    """Everything over the steps of one run but its memory and its time, which have sections of their own."""
    terms = [key for key in iterate_keys(lines, "loss/") if key != "loss/total"]
    first = [key for key in score_keys(lines) if key.startswith(("metric/video_", "metric/frame_"))]
    others = [key for key in score_keys(lines) if key not in first]
    return grid(
        [
            chart("Loss", [("total", series(lines, "loss/total"))]),
            chart("Loss terms, before weighting", [(words(key), series(lines, key)) for key in terms]),
            _scores("Validation scores", lines, first),
            _scores("Validation scores of the other maps", lines, others),
            chart("Learning rate", [("learning rate", series(lines, "optim/lr"))], "", True),
            chart("Gradient norm, before clipping", [("gradient norm", series(lines, "optim/grad_norm"))]),
            chart("Speed", [("clips per second", series(lines, "speed/clips_per_s"))], "clips/s", True),
            chart("Share of time spent waiting for data", [("data wait", data_waits(lines))], "%", True),
        ],
        "No step was logged.",
    )


def memory_charts(lines: Lines) -> str:
    keys = [key for key in iterate_keys(lines, "mem/") if key.endswith("_gib")]
    curves = [(words(key.removesuffix("_gib")), series(lines, key)) for key in keys]
    return grid([chart("Memory of rank 0", curves, "GiB", True)], "No memory was logged.")


def compared_charts(logs: Mapping[str, Lines]) -> str:
    """The same quantities of several runs over one another, those that at least one of them has."""
    scores = [key for key in _union(logs, "metric/") if key.endswith(("_fg_ari", "_mbo"))]
    plain = [(f"Loss: {words(key)}", key, "", False) for key in _union(logs, "loss/")]
    plain += [("Learning rate", "optim/lr", "", True), ("Gradient norm, before clipping", "optim/grad_norm", "", False)]
    plain += [("Speed", "speed/clips_per_s", "clips/s", True), ("Time of a step", "time/step_ms", "ms", True)]
    plain += [("Peak memory of rank 0", "mem/peak_gib", "GiB", True)]

    def over_one_another(title: str, of: Callable[[Lines], Points], unit: str, from_zero: bool) -> str:
        return chart(title, [(name, of(lines)) for name, lines in logs.items()], unit, from_zero, keep_places=True)

    charts = [over_one_another(words(key), partial(_percent_of, key=key), "%", True) for key in scores]
    charts += [over_one_another(title, partial(series, key=key), unit, zero) for title, key, unit, zero in plain]
    charts.append(over_one_another("Share of time spent waiting for data", data_waits, "%", True))
    return grid(charts, "None of the runs logged a step.")


def chart(title: str, curves: Sequence[Curve], unit: str = "", from_zero: bool = False, keep_places: bool = False) -> str:
    """A figure with its caption, and a legend where there is more than one line; "" where nothing is finite.

    `keep_places`: a curve keeps the colour of its place also where others have nothing to show.
    """
    curves = [curve for curve in curves if keep_places or _has_values(curve)]
    picture = line_chart(title, curves, from_zero)
    if not picture:
        return ""
    names = [name if _has_values((name, points)) else f"{name} (none)" for name, points in curves]
    beside = legend(names) if len(curves) > 1 else ""
    caption = escape(title) + (f"<span>, {escape(unit)}</span>" if unit else "")
    return f"<figure><figcaption>{caption}</figcaption>{picture}{beside}</figure>"


def grid(charts: Sequence[str], otherwise: str) -> str:
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else missing(otherwise)


def score_keys(lines: Lines) -> list[str]:
    return [key for key in iterate_keys(lines, "metric/") if key.endswith(("_fg_ari", "_mbo"))]


def data_waits(lines: Lines) -> Points:
    return as_percent([(line["step"], share) for line in lines if (share := data_wait_share(line)) is not None])


def as_percent(points: Points) -> Points:
    return [(step, 100 * value) for step, value in points]


def words(key: str) -> str:
    """The name of a quantity for a person: "metric/video_fg_ari" is "video FG-ARI"."""
    name = key.split("/", 1)[1].replace("_", " ")
    return name.replace("fg ari", "FG-ARI").replace("mbo", "mBO").replace("miou", "mIoU")


def _scores(title: str, lines: Lines, keys: list[str]) -> str:
    return chart(title, [(words(key), _percent_of(lines, key)) for key in keys], "%", from_zero=True)


def _percent_of(lines: Lines, key: str) -> Points:
    return as_percent(series(lines, key))


def _has_values(curve: Curve) -> bool:
    return any(math.isfinite(value) for _, value in curve[1])


def _union(logs: Mapping[str, Lines], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for lines in logs.values() for key in iterate_keys(lines, prefix)))
