"""A report becomes two files that are kept: figures as JSON, a table as Markdown. Named by date and CPU, never by host."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.table import COLUMNS, HEADINGS, Row, cell


def write(folder: Path, report: dict[str, Any], rounds: int) -> Path:
    """Both files; returns the Markdown's path. A second report of a day and CPU takes the place of the first."""
    date = time.strftime("%Y-%m-%d")
    stem = folder / f"{date}-{re.sub(r'[^a-z0-9]+', '_', report['machine']['cpu'].lower()).strip('_')}"
    rows = [{key: value for key, value in asdict(row).items() if value not in (None, "")} for row in report["rows"]]
    plain = {"date": date, "rounds": rounds, "machine": report["machine"], "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(plain, indent=1) + "\n")
    path = stem.with_suffix(".md")
    path.write_text(_markdown(date, rounds, report))
    return path


def _markdown(date: str, rounds: int, report: dict[str, Any]) -> str:
    lines = [
        f"# {date}: {machine.line(report['machine'])}",
        "",
        f"Medians of {rounds} rounds; shape of the parts: {report['shape']}.",
    ]
    rows: list[Row] = report["rows"]
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].section != row.section:
            lines += ["", f"## {row.section}", "", f"| | {' | '.join(HEADINGS)} | |", f"|---|{'---:|' * len(HEADINGS)}---|"]
        figures = " | ".join(cell(name, getattr(row, name)) for name in COLUMNS)
        lines.append(f"| {row.name} | {figures} | {row.beside} |")
    return "\n".join(lines) + "\n"
