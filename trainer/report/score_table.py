"""Scores as a table: the model's rows first, the baselines beside them, so that a number means something.

Comes in: flat score keys, `metric/video_fg_ari` (the first of `evaluate.maps`), `metric/attn_video_fg_ari` (another map),
`baseline/k_means/video_fg_ari`. Goes out: ScoreTable, which console and report print.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_KEY = re.compile(r"(?:metric|baseline/(?P<baseline>[^/]+))/(?:(?P<maps>[a-z0-9]+)_)??(?P<scope>video|frame)_(?P<score>[a-z_]+)")
_SCORES = {"fg_ari": "FG-ARI", "ari": "ARI", "mbo": "mBO", "miou": "mIoU"}
_ROWS = {
    "untrained": "untrained model",
    "grid": "grid of blocks",
    "grid_of_blocks": "grid of blocks",
    "k_means": "k-means on the same features",
    "kmeans": "k-means on the same features",
    "ceiling": "ceiling of the patch grid",
    "patch_ceiling": "ceiling of the patch grid",
}


@dataclass(frozen=True)
class ScoreTable:
    """Units: values in [0, 1] as the run log has them; None where a row has no such score."""

    columns: tuple[str, ...]  # "video FG-ARI", ...
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]  # (name, one value a column); the model's rows come first
    num_model_rows: int

    def cells(self) -> list[list[str]]:
        """Rows of text, scores in percent with one decimal."""
        return [[name, *(percent(value) for value in values)] for name, values in self.rows]


def percent(value: float | None) -> str:
    """A score as papers print it: percent, one decimal, no sign."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if math.isfinite(value) else str(value)


def score_table(values: Mapping[str, float]) -> ScoreTable:
    """Sort the score keys among `values` into rows and columns; other keys are left out."""
    rows: dict[tuple[bool, str], dict[str, float]] = {}
    for key, value in values.items():
        match = _KEY.fullmatch(key)
        if match and match["score"] in _SCORES:
            name = _row_name(match["baseline"], match["maps"])
            rows.setdefault((match["baseline"] is not None, name), {})[f"{match['scope']} {_SCORES[match['score']]}"] = value
    possible = [f"{scope} {score}" for scope in ("video", "frame") for score in _SCORES.values()]
    columns = tuple(column for column in possible if any(column in row for row in rows.values()))
    ordered = sorted(rows.items(), key=lambda item: item[0][0])  # stable: order of appearance within model and baselines
    return ScoreTable(
        columns=columns,
        rows=tuple((name, tuple(row.get(column) for column in columns)) for (_, name), row in ordered),
        num_model_rows=sum(not is_baseline for is_baseline, _ in rows),
    )


def _row_name(baseline: str | None, maps: str | None) -> str:
    name = "model" if baseline is None else _ROWS.get(baseline, baseline.replace("_", " "))
    return f"{name}, {'attention' if maps == 'attn' else maps} maps" if maps else name
