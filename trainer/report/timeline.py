"""Attempts, faults and restarts of a run, in order and on a line of time.

Comes in: a RunFolder with what the launcher noted (events.jsonl, verdict.json, hang.json). Goes out: HTML: a bar for each
attempt, a numbered mark for each fault, and the list that says what the numbers mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from html import escape
from typing import Any

from trainer.observe.console import format_seconds
from trainer.report.events import ROUTINE, describe, severity
from trainer.report.parts import fold, fold_text, missing, note, row, span_words, table
from trainer.report.run import RunFolder, state_of

MAX_MARKS = 40  # on the line; the list has all
MARK_SHARE = 6.5  # percent of a phone's width that a mark takes
MAX_LISTED = 300


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Units: times in seconds since 1970; `ended` None: nothing says that it did."""

    number: int
    began: float
    ended: float | None
    outcome: str  # of the verdict; "" where there is none
    where: str
    why: str


@dataclass(frozen=True)
class Span:
    """The time that the line shows."""

    start: float
    end: float

    def place(self, when: float) -> float:
        """Percent of the width."""
        return min(100.0, max(0.0, 100 * (when - self.start) / (self.end - self.start)))


def timeline_section(run: RunFolder) -> str:
    attempts = attempts_of(run)
    if not attempts and not run.events:
        return missing("Nothing is known of attempts: no events.jsonl and no attempts/ in the run folder.")
    without = "" if run.events else missing("No events.jsonl: the launcher did not start this run, so faults were not noted.")
    span = _span(run, attempts)
    marked = [event for event in run.events if severity(event) != ROUTINE]
    return (
        without
        + note(_count(run, attempts, span))
        + _line(attempts, marked[:MAX_MARKS], _checkpoints(run), span)
        + _attempt_table(attempts, span)
        + _event_list(marked, span, "What happened")
        + _details(run)
        + (fold(f"All {len(run.events)} events", _event_list(run.events, span, "All events")) if run.events else "")
    )


def _count(run: RunFolder, attempts: Sequence[Attempt], span: Span) -> str:
    failed = sum(attempt.outcome == "failed" for attempt in attempts)
    restarts = sum(event["event"] == "restart" for event in run.events)
    words = f"{len(attempts)} attempt{'s' * (len(attempts) != 1)}, {failed} failed; {restarts} restart{'s' * (restarts != 1)}"
    words += f"; {span_words(span.end - span.start)} from the first to the last sign."
    return words + (" Bars are attempts, small ticks checkpoints; numbers are in the list below." if run.events else "")


def attempts_of(run: RunFolder) -> list[Attempt]:
    """From the events; where there are none, from the attempts' own records."""
    begun = {event["attempt"]: event for event in run.events if event["event"] == "attempt" and _whole(event.get("attempt"))}
    ended = {event["attempt"]: event for event in run.events if event["event"] == "verdict" and _whole(event.get("attempt"))}
    found: list[Attempt] = []
    for number in sorted({*begun, *run.attempts}):
        records = run.attempts.get(number, {})
        began = begun[number]["time"] if number in begun else _started(records.get("provenance", {}))
        if began is None:
            continue  # an empty folder: it was given up before anything started
        verdict = records.get("verdict", {})
        length = verdict.get("duration_seconds")
        over = ended[number]["time"] if number in ended else began + length if isinstance(length, int | float) else None
        verdict = ended.get(number) or verdict
        found.append(
            Attempt(
                number=number,
                began=began,
                ended=over,
                outcome=str(verdict.get("outcome") or ""),
                where=_where(begun.get(number, {}), records),
                why=describe({**verdict, "event": "verdict"}) if verdict else "no verdict: its launcher was lost",
            )
        )
    if found and not found[-1].outcome:
        found[-1] = replace(found[-1], why=_without_verdict(run))
    return found


def _without_verdict(run: RunFolder) -> str:
    """About the newest attempt, of which no verdict says how it ended."""
    state, words = state_of(run)
    if state == "finished":
        return "finished" + ("; this page was written before its launcher said so" if run.events else "")
    return words


def _where(event: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
    ranks = event.get("ranks") or records.get("provenance", {}).get("world_size")
    nodes, host = event.get("nodes"), records.get("provenance", {}).get("host")
    words = f"{ranks} rank{'s' * (ranks != 1)}" if ranks else ""
    words += f" on {nodes} node{'s' * (nodes != 1)}" if nodes else ""
    return words + (f" ({host})" if host else "")


def _started(provenance: Mapping[str, Any]) -> float | None:
    try:
        return datetime.strptime(str(provenance.get("started")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def _span(run: RunFolder, attempts: Sequence[Attempt]) -> Span:
    times = [
        *run.log_times[:1],
        *run.log_times[-1:],
        *(event["time"] for event in run.events),
        *(attempt.began for attempt in attempts),
    ]
    times += [attempt.ended for attempt in attempts if attempt.ended is not None]
    start = min(times, default=0.0)
    return Span(start, max([*times, start + 1.0]))


def _checkpoints(run: RunFolder) -> list[float]:
    times = [float(line["time"]) for line in run.lines if "checkpoint/bytes" in line and "time" in line]
    return times[:: max(1, -(-len(times) // 150))]


def _line(attempts: Sequence[Attempt], marked: Sequence[Mapping[str, Any]], checkpoints: Sequence[float], span: Span) -> str:
    bars = []
    nexts = [*(attempt.began for attempt in attempts), span.end][1:]
    for attempt, after in zip(attempts, nexts, strict=True):
        start, end = span.place(attempt.began), span.place(after if attempt.ended is None else attempt.ended)
        kind = "good" if attempt.outcome in ("done", "") else "bad" if attempt.outcome == "failed" else "mid"
        width = max(end - start, 0.6)
        label = str(attempt.number) if width > 3 else ""
        bars.append(f'<span class="bar {kind}" style="left:{min(start, 99.4):.2f}%;width:{width:.2f}%">{label}</span>')
    ticks = "".join(f'<i style="left:{span.place(when):.2f}%"></i>' for when in checkpoints)
    places = [span.place(event["time"]) for event in marked]
    lanes = lanes_of(places)
    marks = "".join(
        f'<span class="mark {severity(event)}" style="left:{place:.2f}%;top:{24 * lane}px">{number}</span>'
        for number, (event, place, lane) in enumerate(zip(marked, places, lanes, strict=True), start=1)
    )
    height = 24 * (max(lanes, default=-1) + 1)
    ends = f"<span>{_clock(span.start)} UTC</span><span>{span_words(span.end - span.start)} later</span>"
    return (
        f'<div class="timeline" aria-hidden="true"><div class="bars">{"".join(bars)}</div><div class="ticks">{ticks}</div>'
        f'<div class="marks" style="height:{height}px">{marks}</div><div class="ends">{ends}</div></div>'
    )


def lanes_of(places: Sequence[float], apart: float = MARK_SHARE) -> list[int]:
    """The first lane for each place (in percent, ascending) in which the mark before it is far enough away."""
    last: list[float] = []
    lanes = []
    for place in places:
        lane = next((number for number, before in enumerate(last) if place - before >= apart), len(last))
        last[lane : lane + 1] = [place]
        lanes.append(lane)
    return lanes


def _attempt_table(attempts: Sequence[Attempt], span: Span) -> str:
    rows = []
    for attempt in attempts:
        length = "" if attempt.ended is None else span_words(attempt.ended - attempt.began)
        cells = [f"+{format_seconds(attempt.began - span.start)}", length, attempt.where, attempt.why]
        rows.append(row(str(attempt.number), cells))
    return table("Attempts", ("attempt", "began", "lasted", "where", "how it ended"), rows) if rows else ""


def _event_list(events: Sequence[Mapping[str, Any]], span: Span, label: str) -> str:
    if not events:
        return ""
    rows = []
    for number, event in enumerate(events[:MAX_LISTED], start=1):
        kind = {"trouble": "fault", "notice": "notice"}.get(severity(event), "")
        attempt = event.get("attempt")
        cells = [f"+{format_seconds(event['time'] - span.start)}", "" if attempt is None else str(attempt), kind, describe(event)]
        rows.append(row(str(number), cells))
    more = note(f"{len(events) - MAX_LISTED} more in events.jsonl.") if len(events) > MAX_LISTED else ""
    return table(label, ("", "when", "attempt", "kind", "what"), rows) + more


def _details(run: RunFolder) -> str:
    """Last words of the rank at fault, and the stacks of a hang."""
    parts = []
    for number, records in run.attempts.items():
        words = records.get("verdict", {}).get("last_lines")
        if isinstance(words, list) and words:
            rank = records["verdict"].get("rank")
            parts.append(fold_text(f"Attempt {number}: last words of rank {rank}", "\n".join(map(str, words))))
        stacks = records.get("hang", {}).get("stacks")
        if isinstance(stacks, Mapping) and stacks:
            text = "\n\n".join(f"rank {rank}\n{_plain(stack)}" for rank, stack in stacks.items())
            why = records["hang"].get("why")
            parts.append(fold_text(f"Attempt {number}: stacks of all ranks when it hung", f"{why}\n\n{text}"))
    return "".join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1)


def _clock(when: float) -> str:
    return escape(time.strftime("%Y-%m-%d %H:%M", time.gmtime(when)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
