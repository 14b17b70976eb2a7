"""Grafana's dashboards as code: the panels below in, grafana/dashboards/*.json out. `python -m cluster.monitoring.dashboards`

The JSON is kept beside this file, so that a site needs neither this program nor its library. --check: whether it is up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SOURCE = "slotstream-prometheus"  # uid of the datasource in grafana/provisioning
CHOSEN = 'run=~"$run",attempt=~"$attempt",node=~"$node"'
WIDTH = 24  # of Grafana's grid


class Query(NamedTuple):
    expr: str  # a metric's braces hold the CHOSEN labels
    legend: str = ""


class Panel(NamedTuple):
    """`height` and `width` in cells of Grafana's grid; panels stand in rows, left to right, in their order."""

    kind: str  # stat | timeseries | table
    title: str
    unit: str
    queries: Sequence[Query]
    help: str = ""
    width: int = 8
    height: int = 8


def stat(title: str, unit: str, *queries: Query, help: str = "") -> Panel:
    return Panel("stat", title, unit, queries, help, width=4, height=4)


def lines(title: str, unit: str, *queries: Query, help: str = "", width: int = 8) -> Panel:
    return Panel("timeseries", title, unit, queries, help, width=width)


def table(title: str, *queries: Query, help: str = "", width: int = 8) -> Panel:
    return Panel("table", title, "short", queries, help, width=width)


def of(metric: str, more: str = "") -> str:
    """A metric of what the viewer has chosen."""
    return f"{metric}{{{more}{CHOSEN}}}"


def rate(metric: str, more: str = "") -> str:
    return f"rate({of(metric, more)}[$__rate_interval])"


def more_of(metric: str, by: str = "") -> str:
    """How often something happened lately."""
    return f"sum {by + ' ' if by else ''}(increase({of(metric)}[$__rate_interval]))"


# Narrower than what the viewer has chosen:
COMPUTING, FIRST = 'phase=~"forward|backward",', 'rank="0",'
MBO, FIRING = 'metric="video_mbo",', 'alertstate="firing",'
RUN = [
    stat("Ranks up", "short", Query(f"sum({of('up')})", "up"), Query(f"max({of('slotstream_world_size')})", "of"),
         help="Ranks that answer, of those that train together."),
    stat("Updates in this attempt", "short", Query(f"max({of('slotstream_steps_total')})", "updates")),
    stat("Since the last update", "s", Query(f"time() - max({of('slotstream_last_step_timestamp_seconds')})", "age")),
    stat("Age of the last checkpoint", "s",
         Query(f"time() - max({of('slotstream_checkpoint_last_success_timestamp_seconds')})", "age"),
         help="What would be lost if the run died now."),
    stat("Clips per second", "short", Query(f"sum({rate('slotstream_samples_total')})", "clips/s")),
    stat("Share of time waiting for data", "percentunit", Query(f"avg({rate('slotstream_data_wait_seconds_total')})", "wait")),
    lines("Loss by term", "short", Query(f"max by (run, term) ({of('slotstream_loss')})", "{{run}} {{term}}"),
          help="Over the global batch; total is the weighted sum."),
    lines("Gradient norm before clipping", "short", Query(f"max by (run) ({of('slotstream_grad_norm')})", "{{run}}")),
    lines("Learning rate", "sci", Query(f"max by (run) ({of('slotstream_learning_rate')})", "{{run}}")),
    lines("Time of an update by phase", "s",
          Query(f"sum by (phase) ({rate('slotstream_step_duration_seconds_sum')}) / "
                f"(sum by (phase) ({rate('slotstream_step_duration_seconds_count')}) > 0)", "{{phase}}"),
          help="Mean over the ranks of the updates in which the phase took place."),
    lines("Clips and frames per second", "short",
          Query(f"sum by (run) ({rate('slotstream_samples_total')})", "{{run}} clips/s"),
          Query(f"sum by (run) ({rate('slotstream_frames_total')})", "{{run}} frames/s")),
    lines("Waiting for data by rank", "percentunit", Query(rate("slotstream_data_wait_seconds_total"), "rank {{rank}}"),
          help="Share of the time in which a rank waits for its loader."),
    lines("Time in forward and backward by rank", "percentunit",
          Query(f"sum by (rank) ({rate('slotstream_step_duration_seconds_sum', COMPUTING)})", "rank {{rank}}"),
          help="A rank well above the others is slow; the others wait for it."),
    lines("Batches ready", "short", Query(of("slotstream_data_queue_depth"), "rank {{rank}}"),
          help="Batches that the loader had ready; 0 means that training waits."),
    lines("Position in the data", "short",
          Query(f"max by (run) ({of('slotstream_data_position')})", "{{run}} samples"),
          Query(f"max by (run) ({of('slotstream_data_epoch')})", "{{run}} epoch")),
    lines("Memory", "bytes", Query(f"max by (kind, rank) ({of('slotstream_memory_bytes')})", "{{kind}} rank {{rank}}"),
          help="host: resident set; device: peak that the allocator held."),
    lines("Checkpoint size", "bytes", Query(f"max by (run) ({of('slotstream_checkpoint_bytes')})", "{{run}}"), width=4),
    lines("Checkpoint duration", "s",
          Query(f"max by (run) ({of('slotstream_checkpoint_duration_seconds')})", "{{run}}"), width=4),
    lines("Incidents", "short",
          Query(more_of("slotstream_nonfinite_total"), "not finite"),
          Query(more_of("slotstream_samples_skipped_total"), "damaged samples"),
          Query(more_of("slotstream_checkpoint_verify_failures_total"), "damaged checkpoints"),
          Query(more_of("slotstream_preemptions_total"), "asked to stop")),
    lines("Validation scores", "percentunit",
          Query(f"max by (run, metric) ({of('slotstream_score')})", "{{run}} {{metric}}"), width=16),
    table("What runs", Query(f"max without (instance, job, rank) ({of('slotstream_run_info', FIRST)})")),
]  # fmt: skip
CLUSTER = [
    stat("Runs", "short", Query(f"count(count by (run) ({of('slotstream_world_size')}))", "runs")),
    stat("Ranks up", "short", Query(f"sum({of('up')})", "up"), Query(f"count({of('up')})", "listed")),
    stat("Alerts", "short", Query(f"count({of('ALERTS', FIRING)}) or 0 * count({of('up')})", "firing"),
         help="Firing now. What each means, and what to do: runbook.md."),
    stat("Clips per second", "short", Query(f"sum({rate('slotstream_samples_total')})", "clips/s")),
    stat("Bytes per second from servers", "Bps", Query(f"sum({rate('slotstream_shard_fetched_bytes_total')})", "fetched")),
    stat("Restarts", "short", Query(f"sum(max by (run) ({of('slotstream_restarts_total')}))", "restarts"),
         help="Attempts before the present ones, over all runs."),
    lines("Updates per second", "short", Query(f"max by (run) ({rate('slotstream_steps_total')})", "{{run}}")),
    lines("Clips per second by run", "short", Query(f"sum by (run) ({rate('slotstream_samples_total')})", "{{run}}")),
    lines("Ranks by run", "short", Query(f"max by (run) ({of('slotstream_world_size')})", "{{run}}")),
    lines("Slowest rank against the others", "short",
          Query(f"max by (run) ({of('slotstream_straggler_ratio')})", "{{run}}"),
          help="Time that a rank needs before it meets the others. Well above 1: a straggler, and everybody waits."),
    lines("Waiting for data", "percentunit",
          Query(f"avg by (run) ({rate('slotstream_data_wait_seconds_total')})", "{{run}}"),
          help="Share of the time in which ranks wait for their loader."),
    lines("Bytes from servers by node", "Bps",
          Query(f"sum by (node) ({rate('slotstream_shard_fetched_bytes_total')})", "{{node}}")),
    lines("Attempts", "short", Query(f"max by (run) ({of('slotstream_restarts_total')})", "{{run}}"),
          help="Each step up is a restart."),
    lines("Age of the last checkpoint", "s",
          Query(f"time() - max by (run) ({of('slotstream_checkpoint_last_success_timestamp_seconds')})", "{{run}}")),
    lines("Memory by node", "bytes", Query(f"sum by (node, kind) ({of('slotstream_memory_bytes')})", "{{node}} {{kind}}")),
    lines("Scores", "percentunit", Query(f"max by (run) ({of('slotstream_score', MBO)})", "{{run}}"),
          help="Newest video mBO of each run.", width=16),
    table("What runs", Query(f"max without (instance, job, rank) ({of('slotstream_run_info', FIRST)})")),
]  # fmt: skip
BUILD_LEFT = f"({of('slotstream_build_videos_wanted')} - {of('slotstream_build_videos_total')})"
HITS, MISSES = (f"sum by (node) (rate({of(f'slotstream_shard_{what}_total')}[5m]))" for what in ("hits", "misses"))
DATA = [
    stat("Videos written", "short", Query(f"sum({of('slotstream_build_videos_total')})", "written"),
         Query(f"sum({of('slotstream_build_videos_wanted')})", "of")),
    stat("Videos per second", "short", Query(f"sum({rate('slotstream_build_videos_total')})", "videos/s")),
    stat("Ready in", "s", Query(f"max({BUILD_LEFT} / (rate({of('slotstream_build_videos_total')}[5m]) > 0))", "left"),
         help="Of the build that takes longest, at its speed of the last 5 minutes."),
    stat("Videos left out", "short", Query(f"sum({of('slotstream_build_skipped_total')})", "left out"),
         help="Could not be read while shards were built."),
    stat("Damaged samples", "short", Query(f"sum({of('slotstream_samples_skipped_total')})", "replaced"),
         help="Met by trainings: replaced by the next sound one."),
    stat("Damaged shards from servers", "short", Query(f"sum({of('slotstream_shard_corrupt_total')})", "fetched again")),
    lines("Videos written by build", "short", Query(f"max by (run) ({of('slotstream_build_videos_total')})", "{{run}}"),
          Query(f"max by (run) ({of('slotstream_build_videos_wanted')})", "{{run}} wanted")),
    lines("Shards of a build", "short", Query(f"max by (run) ({of('slotstream_build_shards_total')})", "{{run}}"),
          Query(f"max by (run) ({of('slotstream_build_shards_wanted')})", "{{run}} wanted")),
    lines("Bytes written per second", "Bps",
          Query(f"max by (run) ({rate('slotstream_build_written_bytes_total')})", "{{run}}")),
    lines("Share of shards found in the cache", "percentunit",
          Query(f"{HITS} / ({HITS} + {MISSES} > 0) or 0 * sum by (node) ({of('up')})", "{{node}}"),
          help="0 also where nothing comes from a server."),
    lines("Bytes from servers by node", "Bps",
          Query(f"sum by (node) ({rate('slotstream_shard_fetched_bytes_total')})", "{{node}}")),
    lines("Damage met by trainings", "short",
          Query(f"sum by (run) ({of('slotstream_samples_skipped_total')})", "{{run}} samples"),
          Query(f"sum by (run) ({of('slotstream_shard_corrupt_total')})", "{{run}} shards")),
    lines("Batches ready", "short", Query(f"min by (run) ({of('slotstream_data_queue_depth')})", "{{run}}"),
          help="Of the rank that has fewest; 0 means that it waits."),
    lines("Waiting for data", "percentunit",
          Query(f"max by (run) ({rate('slotstream_data_wait_seconds_total')})", "{{run}}"),
          help="Share of the time in which a run's slowest reader waits for its loader."),
    lines("Epoch", "short", Query(f"max by (run) ({of('slotstream_data_epoch')})", "{{run}}")),
    table("What is built", Query(f"max without (instance, job, rank) ({of('slotstream_build_info')})"), width=24),
]  # fmt: skip
DASHBOARDS: dict[str, tuple[str, list[Panel]]] = {"run": ("Run", RUN), "cluster": ("Cluster", CLUSTER), "data": ("Data", DATA)}
# Each within what was chosen before. `up` is there for builds, too.
VARIABLES = {
    "run": '{job="slotstream"}',
    "attempt": '{job="slotstream",run=~"$run"}',
    "node": '{job="slotstream",run=~"$run",attempt=~"$attempt"}',
}


def render(name: str) -> str:
    """The JSON of a dashboard, as Grafana's provisioning reads it."""
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DashboardCursorSync

    title, panels = DASHBOARDS[name]
    builder = dashboard.Dashboard(title).uid(f"slotstream-{name}").tags(["slotstream"]).readonly().refresh("10s")
    builder = builder.time("now-1h", "now").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    for label, within in VARIABLES.items():
        builder = builder.with_variable(_variable(label, f"label_values(up{within}, {label})"))
    x = y = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > WIDTH:
            x, y = 0, y + panels[number - 2].height
        builder = builder.with_panel(_panel(panel, number, x, y))
        x += panel.width
    built = json.loads(JSONEncoder(sort_keys=True).encode(builder.build()))
    return json.dumps(_without_nulls(built), indent=1) + "\n"


def _without_nulls(value: Any) -> Any:
    """Grafana takes its own default for a key that is not there, and stumbles over some that are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _source() -> Any:
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    return DataSourceRef(type_val="prometheus", uid=SOURCE)


def _variable(label: str, query: str) -> Any:
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.models.dashboard import VariableOption, VariableRefresh, VariableSort

    everything = VariableOption(text="All", value="$__all", selected=True)
    builder = dashboard.QueryVariable(label).label(label).datasource(_source()).query({"query": query, "refId": label})
    builder = builder.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.NUMERICAL_DESC)
    return builder.multi(True).include_all(True).all_value(".*").current(everything)


def _panel(panel: Panel, number: int, x: int, y: int) -> Any:
    from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
    from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
    from grafana_foundation_sdk.models.dashboard import GridPos
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    module: Any = {"stat": stat, "timeseries": timeseries, "table": table}[panel.kind]
    builder = module.Panel().id(number).title(panel.title).datasource(_source()).unit(panel.unit)
    builder = builder.grid_pos(GridPos(x=x, y=y, w=panel.width, h=panel.height))
    if panel.help:
        builder = builder.description(panel.help)
    if panel.kind == "stat":
        builder = builder.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if panel.kind == "timeseries":
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        builder = builder.legend(legend.show_legend(True)).tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    for letter, query in zip("ABCDEFG", panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).datasource(_source()).expr(query.expr).legend_format(query.legend)
        if panel.kind == "table":
            target = target.format(PromQueryFormat.TABLE).instant()
        builder = builder.with_target(target)
    return builder


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words not in ([], ["--check"]):
        print("python -m cluster.monitoring.dashboards [--check]\n\nWrites grafana/dashboards/*.json; --check compares only.")
        return 0 if words in (["--help"], ["-h"]) else 2
    try:
        import grafana_foundation_sdk  # noqa: F401
    except ImportError:
        print(
            "grafana_foundation_sdk is not installed; it makes the dashboards; pip install 'slotstream[dev]'",
            file=sys.stderr,
        )
        return 2
    stale = []
    for name in DASHBOARDS:
        path = HERE / "grafana" / "dashboards" / f"{name}.json"
        text = render(name)
        if words and (not path.exists() or path.read_text() != text):
            stale.append(path.name)
        elif not words:
            path.write_text(text)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run python -m cluster.monitoring.dashboards", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
