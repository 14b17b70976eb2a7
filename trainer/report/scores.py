"""Scores: the model's, the baselines' on the same videos, and the published ones where the experiment carries them.

Comes in: a RunFolder. Goes out: HTML tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.observe.run_log import latest
from trainer.report.parts import missing, note, table
from trainer.report.run import RunFolder
from trainer.report.score_table import ScoreTable, percent, score_table

Row = tuple[str, str, Sequence[float | None], Sequence[float | None]]  # name, kind, scores, spreads (or nothing)


def score_section(run: RunFolder) -> str:
    """The last evaluation of the training, then that of `python -m trainer.evaluate`, where there is one."""
    values = latest(run.lines, ("metric/", "baseline/"))
    first = _tables(values, run.config)
    if not first:
        published = published_table(run.config)
        first = missing("No evaluation was logged.") + (_published_alone(published, run.config) if published.rows else "")
    return first + _scored_again(run)


def published_scores(config: Mapping[str, Any]) -> tuple[str, dict[str, float], dict[str, float]]:
    """(source, scores, spreads) of an experiment, in [0, 1]; empty where it carries none."""
    published = config.get("published")
    published = published if isinstance(published, Mapping) else {}

    def shares(name: str) -> dict[str, float]:
        part = published.get(name)
        items = part.items() if isinstance(part, Mapping) else ()
        return {f"metric/{key}": value / 100 for key, value in items if isinstance(value, int | float)}

    return str(published.get("source") or "paper"), shares("percent"), shares("plus_minus")


def published_table(config: Mapping[str, Any]) -> ScoreTable:
    return score_table(published_scores(config)[1])


def _tables(values: Mapping[str, float], config: Mapping[str, Any]) -> str:
    """One table of a set of score keys, with the published row between the model and the baselines."""
    own = score_table(values)
    if not own.rows:
        return ""
    source, published, spread = published_scores(config)
    columns = _union(own.columns, score_table(published).columns)
    rows: list[Row] = [
        (name, "model" if number < own.num_model_rows else "baseline", _spread_over(own, row, columns), ())
        for number, (name, row) in enumerate(own.rows)
    ]
    if published:
        scores, spreads = _only_row(published, columns), _only_row(spread, columns)
        rows.insert(own.num_model_rows, ("published: " + source, "published", scores, spreads))
    best = [_best(rows, column) for column in range(len(columns))]
    words = "Percent, higher is better. Baselines are scored on the same videos; the best of these rows but the ceiling "
    beside = " The published scores are of the full experiment, whatever this run changed." if published else ""
    return note(f"{words}is bold.{beside}") + table("Scores", ("method", *columns), _lines(rows, best), "scores")


def _published_alone(published: ScoreTable, config: Mapping[str, Any]) -> str:
    source, _, spread = published_scores(config)
    rows: list[Row] = [("published: " + source, "published", published.rows[0][1], _only_row(spread, published.columns))]
    columns = ("method", *published.columns)
    return table("Published scores", columns, _lines(rows, [None] * len(published.columns)), "scores")


def _scored_again(run: RunFolder) -> str:
    record = run.evaluation
    scores, baselines = record.get("scores"), record.get("baselines")
    if not isinstance(scores, Mapping):
        return ""
    flat = {f"metric/{key}": value for key, value in scores.items() if isinstance(value, int | float)}
    for name, part in baselines.items() if isinstance(baselines, Mapping) else ():
        flat |= {f"baseline/{name}/{key}": value for key, value in part.items() if isinstance(value, int | float)}
    content = _tables(flat, {})
    where = f"{record.get('shards')}/{record.get('split')}"
    title = f"Scored again: step {record.get('step')}, {record.get('videos')} videos of {where}"
    return f"<h3>{escape(title)}</h3>{content}" if content else ""


def _lines(rows: Sequence[Row], best: Sequence[float | None]) -> list[str]:
    lines, before = [], ""
    for name, kind, values, spreads in rows:
        cells = "".join(
            _cell(value, spreads[place] if spreads else None, kind != "published" and value is not None and value == best[place])
            for place, value in enumerate(values)
        )
        first = " first" if before and kind != before else ""
        lines.append(f'<tr class="{kind}{first}"><th scope="row">{escape(name)}</th>{cells}</tr>')
        before = kind
    return lines


def _cell(value: float | None, spread: float | None, best: bool) -> str:
    share = 0.0 if value is None or not math.isfinite(value) else min(1.0, max(0.0, value))
    text = percent(value) + ("" if spread is None else f" ± {percent(spread)}")
    return f'<td style="--share:{100 * share:.1f}%">{f"<b>{text}</b>" if best else text}</td>'


def _best(rows: Sequence[Row], column: int) -> float | None:
    """The ceiling is what a perfect labelling of patches would get: a bound, no competitor; a paper's score is from elsewhere."""
    values = [row[column] for name, kind, row, _ in rows if not name.startswith("ceiling") and kind != "published"]
    return max((value for value in values if value is not None and math.isfinite(value)), default=None)


def _union(one: Sequence[str], other: Sequence[str]) -> list[str]:
    possible = [f"{scope} {score}" for scope in ("video", "frame") for score in ("FG-ARI", "ARI", "mBO", "mIoU")]
    return [column for column in possible if column in one or column in other]


def _spread_over(source: ScoreTable, row: Sequence[float | None], columns: Sequence[str]) -> list[float | None]:
    values = dict(zip(source.columns, row, strict=True))
    return [values.get(column) for column in columns]


def _only_row(scores: Mapping[str, float], columns: Sequence[str]) -> list[float | None]:
    found = score_table(scores)
    return _spread_over(found, found.rows[0][1], columns) if found.rows else [None] * len(columns)


def compared_table(rows: Mapping[str, Mapping[str, float]], published: Mapping[str, Mapping[str, float]]) -> str:
    """Named rows of scores by column, then the published ones."""
    everything = {**rows, **published}
    columns = _union([column for values in everything.values() for column in values], ())
    lines: list[Row] = [
        (name, "published" if name in published else "model", [values.get(column) for column in columns], ())
        for name, values in everything.items()
    ]
    best = [_best(lines, column) for column in range(len(columns))]
    return table("Scores of the runs", ("run", *columns), _lines(lines, best), "scores")
