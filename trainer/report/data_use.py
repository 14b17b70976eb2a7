"""What the run was fed: clips, epochs, skipped samples, and the order they came in. Comes in: a RunFolder. Goes out: HTML.

The order hash is the SHA-256 of the sample ids of all applied updates in the order of the stream, one decimal number a line. It
does not depend on the number of ranks; two runs with the same hash have seen the same clips in the same order.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.observe.run_log import latest
from trainer.report.parts import facts, missing
from trainer.report.run import RunFolder


@dataclass(frozen=True)
class OrderRecord:
    """What order/rank*.jsonl says. `steps`: updates recorded; `whole`: none is missing from the first to the last."""

    sha256: str
    clips: int
    steps: int
    whole: bool


def data_section(run: RunFolder) -> str:
    return facts(data_facts(run)) or missing("Neither config.yaml nor a checkpoint says what the run was fed.")


def data_facts(run: RunFolder) -> list[tuple[str, str]]:
    """(what, value) pairs, as far as the run folder knows them."""
    data, optim = (_mapping(run.config.get(name)) for name in ("data", "optim"))
    logged = latest(run.lines, ("data/",))
    position = _mapping(_mapping(run.state.get("train")).get("position"))
    batch = optim.get("global_batch")
    rows = [("shards", _shards(data)), ("videos in them", _whole(logged.get("data/videos"))), ("clips", _clips(data, batch))]
    if isinstance(batch, int) and run.last_step is not None:
        rows.append(("clips taken", f"{run.last_step * batch:,} in {run.last_step:,} updates"))
    if "data/epoch" in logged:
        rows.append(("epoch reached", f"{logged['data/epoch']:.0f} (0 is the first)"))
    if "data/skipped" in logged:
        rows.append(("damaged samples replaced", f"{logged['data/skipped']:.0f} on rank 0; each rank's log names its own"))
    rows.append(("data set version", str(position.get("dataset_version") or "")))
    if "position" in position:
        rows.append(("stream, at the newest checkpoint", _stream(position)))
    return [(name, value) for name, value in [*rows, *_order_rows(run)] if value]


def read_order(folder: Path) -> OrderRecord | None:
    """The hash of the recorded order; None where nothing was recorded. Reads the files side by side, a line of each at a time.

    Raises ValueError or KeyError for a line that is not one of the record.
    """
    files = sorted(folder.glob("rank*.jsonl"))
    if not any(path.stat().st_size for path in files):
        return None
    merged = heapq.merge(*(_records(path) for path in files), key=lambda line: line["step"])
    digest, clips, steps, last = hashlib.sha256(), 0, 0, None
    whole = True
    for step, group in itertools.groupby(merged, key=lambda line: line["step"]):
        pairs = sorted(
            pair for line in group for pair in zip(line.get("positions", itertools.count()), line["ids"], strict=False)
        )
        digest.update("".join(f"{sample}\n" for _, sample in pairs).encode())
        whole = whole and step == (1 if last is None else last + 1)
        clips, steps, last = clips + len(pairs), steps + 1, step
    return OrderRecord(digest.hexdigest(), clips, steps, whole)


def order_words(run: RunFolder) -> str:
    """The order hash in short, or why there is none."""
    return next((value for name, value in _order_rows(run) if name == "order hash"), "")


def _order_rows(run: RunFolder) -> list[tuple[str, str]]:
    try:
        order = read_order(run.path / "order")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [("order hash", f"none: order/ cannot be read ({error})")]
    if order is None:
        return [("order hash", "none: the order was not recorded; observe.record_order=true does")] if run.lines else []
    gaps = "" if order.whole else "; updates are missing in the record"
    return [("order hash", f"{order.sha256} ({order.clips:,} clips of {order.steps:,} updates{gaps})")]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):  # else a kill cut it short
                yield json.loads(text)


def _shards(data: Mapping[str, Any]) -> str:
    parts = [part for part in data.get("mixture") or () if isinstance(part, Mapping)]
    roots = [str(part.get("root")) for part in parts or [data] if "root" in part]
    splits = f"; {data.get('train_split', 'train')} and {data.get('val_split', 'validation')}" if roots else ""
    return " + ".join(roots) + splits


def _clips(data: Mapping[str, Any], batch: Any) -> str:
    if "clip_len" not in data:
        return ""
    taken = "features taken from frames while it trains" if data.get("input") == "frames" else f"{data.get('features')} features"
    return f"{data['clip_len']} frames each, {data.get('image_size')} pixels, {taken}" + (f", {batch} an update" if batch else "")


def _stream(position: Mapping[str, Any]) -> str:
    return (
        f"position {position['position']}, seed {position.get('seed')}, {position.get('global_batch')} clips an update, "
        f"rules {position.get('order', 'order 1')}; these and the data set version fix every clip"
    )


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
