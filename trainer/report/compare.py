"""Several runs on one page: what was set differently, their scores beside one another, their curves over one another.

Comes in: run folders. Goes out: one HTML file. Runs that bear the same name are told apart by their folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically
from trainer.observe.run_log import latest
from trainer.report.charts import compared_charts
from trainer.report.data_use import order_words
from trainer.report.gallery import gallery_section, load_gallery
from trainer.report.page import fill_page, headline, state_words
from trainer.report.parts import missing, note, row, section, table
from trainer.report.run import RunFolder, flatten, read_run
from trainer.report.score_table import score_table
from trainer.report.scores import compared_table, published_scores
from trainer.report.time_use import phases_of

_OWN = ("name", "runs")  # every run has its own; a difference there says nothing


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page that compares the runs to `out`; return its path."""
    runs = {name: read_run(path) for name, path in zip(names_of(run_dirs), run_dirs, strict=True)}
    problems = [f"{name}: {text}" for name, run in runs.items() for text in run.problems]
    lines = "".join(f'<p class="problem">{escape(text)}</p>' for text in problems)
    sections = [
        section("runs", "The runs", overview(runs)),
        section("scores", "Scores", scores(runs)),
        section("settings", "What was set differently", settings(runs)),
        section("curves", "Curves", compared_charts({name: run.lines for name, run in runs.items()})),
        section("times", "Where the time of a step went", times(runs)),
        section("pictures", "What the slots see", pictures(runs)),
    ]
    page = fill_page(" · ".join(runs), f"Slotstream, {len(runs)} runs compared", lines, sections)
    write_atomically(out, page.encode())
    return out


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path before them as it takes to tell them apart."""
    parts = [path.absolute().parts for path in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(item[-depth:]) for item in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(run_dirs, start=1)]


def overview(runs: Mapping[str, RunFolder]) -> str:
    found = {name: [("state", state_words(run)), *headline(run)] for name, run in runs.items()}
    for name, run in runs.items():
        commit = str(run.provenance.get("commit") or "")[:12]
        dirty = ", changed" if run.provenance.get("uncommitted_changes") else ""
        found[name] += [("commit", commit + dirty), ("ranks", str(run.provenance.get("world_size", "")))]
        found[name] += [("order hash", order_words(run)[:12])]
    return _by_run(found, "The runs")


def scores(runs: Mapping[str, RunFolder]) -> str:
    """A row for each run's first map and each baseline-free map, and a row for each published result among the runs."""
    rows: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        own = score_table(latest(run.lines, ("metric/",)))
        for label, values in own.rows:
            known = {column: value for column, value in zip(own.columns, values, strict=True) if value is not None}
            rows[f"{name}{label.removeprefix('model')}"] = known
    published = {}
    for run in runs.values():
        source, reported, _ = published_scores(run.config)
        found = score_table(reported)
        for _, values in found.rows:
            known = {column: value for column, value in zip(found.columns, values, strict=True) if value is not None}
            published["published: " + source] = known
    if not rows:
        return missing("None of the runs was evaluated.")
    words = "Percent, higher is better; the best of each column is bold. Of each run the last evaluation that it logged."
    return note(words) + compared_table(rows, published)


def settings(runs: Mapping[str, RunFolder]) -> str:
    """Every setting that is not the same in all runs."""
    with_config = {name: flatten(run.config) for name, run in runs.items() if run.config}
    without = [name for name in runs if name not in with_config]
    words = missing(f"Without a readable config.yaml: {', '.join(without)}.") if without else ""
    differing = differences(with_config)
    if not differing:
        return words + (missing("All settings are the same.") if len(with_config) > 1 else "")
    rows = [row(key, [_shown(values.get(name)) for name in with_config]) for key, values in differing.items()]
    return words + table("Settings that differ", ("setting", *with_config), rows, "plain wide")


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """key -> run -> value, of the keys whose values are not all the same; a key that a run lacks has no value there."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in _OWN)
    found = {key: {name: config[key] for name, config in configs.items() if key in config} for key in keys}
    return {
        key: values for key, values in found.items() if len(values) < len(configs) or len({repr(v) for v in values.values()}) > 1
    }


def times(runs: Mapping[str, RunFolder]) -> str:
    found = {
        name: [(phase, f"{ms:.3g} ms") for phase, ms in phases_of(run.lines).items()] for name, run in runs.items() if run.lines
    }
    found = {name: phases for name, phases in found.items() if phases}
    return _by_run(found, "Phases of a step") if found else missing("No times of steps were logged.")


def pictures(runs: Mapping[str, RunFolder]) -> str:
    """Of each run the best and the worst video alone: a page of many runs stays small."""
    parts = []
    for number, (name, run) in enumerate(runs.items()):
        items = load_gallery(run.path / "report", [])
        chosen = [items[0], items[-1]] if len(items) > 2 else items
        parts.append(f"<h3>{escape(name)}</h3>{gallery_section(chosen, f'run{number}_')}")
    return "".join(parts)


def _by_run(found: Mapping[str, Sequence[tuple[str, str]]], label: str) -> str:
    """A line for each fact, a column for each run."""
    facts = {name: dict(pairs) for name, pairs in found.items()}
    keys = dict.fromkeys(key for pairs in facts.values() for key in pairs if any(facts[name].get(key) for name in facts))
    rows = [row(key, [facts[name].get(key) or "–" for name in facts]) for key in keys]
    return table(label, ("", *facts), rows, "plain wide")


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)
