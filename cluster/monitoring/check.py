"""Does every panel and every rule have data? A Prometheus's address in, a table out. `python -m cluster.monitoring.check`

Executes every query of the three dashboards as Grafana would, asks for every recording rule's series, and for the series that
each alert looks at. Exit code 1 where one of them has none. A run and a build must have been scraped within the last minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
DASHBOARDS = ("run", "cluster", "data")
METRIC = re.compile(r"(?<![\w:.])(?:(?:run|rank):)?slotstream_[\w:]+|\bup\b")

Ask = Callable[..., Any]  # (path of the API, parameters) -> the answer's data


class CheckError(Exception):
    """One line for the user."""


class Row(NamedTuple):
    group: str
    name: str
    query: str
    series: int


def connect(url: str) -> Ask:
    """Asks a Prometheus's API. What it returns raises CheckError where the server does not answer, or refuses the query."""

    def ask(path: str, **parameters: str) -> Any:
        address = f"{url.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise CheckError(f"{parameters.get('query', path)}: refused by {url}: {error.read().decode()[:300]}") from None
        except (OSError, ValueError, KeyError) as error:
            raise CheckError(f"no Prometheus answers at {url}: {error}; launch.py monitor starts one, or give --url") from None

    return ask


def panel_queries() -> Iterator[tuple[str, str, str]]:
    """(dashboard, panel, query as it stands in the file)."""
    for name in DASHBOARDS:
        content = json.loads((HERE / "grafana" / "dashboards" / f"{name}.json").read_text())
        for panel in content["panels"]:
            for target in panel["targets"]:
                yield name, panel["title"], target["expr"]


def concrete(query: str, run: str = ".*", window: str = "1m") -> str:
    """A dashboard's query with its variables filled in as Grafana does: one run, or "All"."""
    return re.sub(r"\$(attempt|node)\b", ".*", query.replace("$__rate_interval", window).replace("$run", run))


def panels(ask: Ask, run: str = ".*", window: str = "1m") -> list[Row]:
    """A row for each query of each panel."""
    found = []
    for dashboard, panel, query in panel_queries():
        asked = concrete(query, run, window)
        found.append(Row(dashboard, panel, asked, len(ask("query", query=asked)["result"])))
    return found


def rules(ask: Ask) -> list[Row]:
    """A row for each recording rule, and for each metric that an alert's expression names."""
    found = []
    for group in ask("rules")["groups"]:
        for rule in group["rules"]:
            names = [rule["name"]] if rule["type"] == "recording" else sorted(set(METRIC.findall(rule["query"])))
            for name in names:
                shown = rule["name"] if rule["type"] == "recording" else f"{rule['name']}: {name}"
                found.append(Row(rule["type"], shown, name, len(ask("query", query=name)["result"])))
    return found


def table(rows: Sequence[Row]) -> str:
    """Series of each query, and a summary line for each group."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{row.group:<10}{row.name:<{width}}{row.series:>6}" + ("" if row.series else "   no data") for row in rows]
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        names = {row.name.partition(":")[0] if group == "alerting" else row.name for row in own}
        of = {"recording": f"{len(own)} rules", "alerting": f"{len(own)} series of {len(names)} alerts"}
        shown = of.get(group, f"{len(own)} queries of {len(names)} panels")
        lines.append(f"{group}: {shown}, {sum(not row.series for row in own)} without data")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring.check", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus (default: launch.py monitor's)")
    parser.add_argument("--run", help="one run; default: all")
    parser.add_argument("--window", default="1m", help="of rates; at least four scrape intervals (default 1m)")
    options = parser.parse_args(argv)
    ask = connect(options.url)
    try:
        known = ask("label/run/values")
        if options.run is not None and options.run not in known:
            raise CheckError(f"--run {options.run}: no target has this label; known: {', '.join(known) or 'none'}")
        rows = panels(ask, re.escape(options.run) if options.run else ".*", options.window) + rules(ask)
    except CheckError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    return int(any(not row.series for row in rows))


if __name__ == "__main__":
    sys.exit(main())
