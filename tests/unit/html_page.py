"""An HTML page as tests read it, and a run folder that has everything a report can show."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from trainer.observe.run_log import RunLog
from trainer.report.render import GalleryItem

VOID = {"meta", "img", "br", "line", "circle", "path", "link", "input"}
HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Checks that tags nest, and collects text, attributes and tags."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.content = content
        self.open: list[str] = []
        self.text: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []  # every table row as the texts of its cells
        self.feed(content)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def row(self, name: str) -> list[str]:
        """The cells after the heading of the only row with that heading."""
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found

    def all(self, tag: str, **having: str) -> list[dict[str, str | None]]:
        names = {name.rstrip("_"): value for name, value in having.items()}
        return [found for kind, found in self.seen if kind == tag and all(found.get(k) == v for k, v in names.items())]

    def needs_nothing(self) -> None:
        """No script, no event handler, nothing fetched."""
        tags = {tag for tag, _ in self.seen}
        assert not tags & {"script", "link", "iframe", "object", "base"}
        assert not any(word in self.content for word in ("http://", "https://", "@import", "url("))
        for _, attributes in self.seen:
            assert not any(name.startswith("on") for name in attributes), attributes
            for name in ("src", "href"):
                assert (attributes.get(name) or "data:").startswith("data:")


def video(key: str = "clip_7", scores: dict | None = None, frames: int = 3, **more) -> GalleryItem:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, (frames, 6))
    parts = {
        "frames": generator.integers(0, 255, (frames, 8, 12, 3), dtype=np.uint8),
        "truth": generator.integers(0, 3, (frames, 8, 12)),
        "attn_labels": labels,
        "object_labels": labels,
        "merged_attn_labels": labels,
        "merged_object_labels": labels,
        "boundary": labels > 1,
        "interior": labels < 1,
    }
    return GalleryItem(**{"key": key, "grid": (2, 3), "scores": scores or {}, **parts, **more})


def write_run(folder: Path, steps: int = 200, published: str = "") -> Path:
    """A run with curves, scores, baselines, configuration and provenance, whose names try to break the page."""
    with RunLog(folder / "metrics.jsonl") as log:
        fixed = {"loss/slot_contrast": 2.0, "optim/lr": 1e-3, "mem/peak_gib": 1.25, "data/skipped": 2}
        phases = {"step": 100.0, "data_wait": 5.0, "forward": 40.0, "backward": 30.0, "optimizer": 15.0}
        fixed |= {f"time/{name}_ms": value for name, value in phases.items()}
        for step in range(10, steps + 1, 10):
            loss = math.nan if step == 50 else 1 / step
            log.write(step, {"loss/total": loss, "data/epoch": step // 100, **fixed})
        log.write(steps, {"metric/video_fg_ari": 0.4567, "metric/frame_mbo": 0.1234, "metric/attn_video_fg_ari": 0.3891})
        log.write(steps, {"baseline/k_means/video_fg_ari": 0.5432, "baseline/grid/video_fg_ari": 0.2019})
        log.write(steps, {"baseline/a<i>/video_mbo": 0.111})
    (folder / "config.yaml").write_text(
        f"name: '{HOSTILE}'\ndata: {{root: data/x, clip_len: 4, features: dino, image_size: 12}}\n"
        f"optim: {{lr: 0.001, max_steps: {steps}, global_batch: 8}}\n{published}"
    )
    (folder / "provenance.json").write_text(
        json.dumps({"command": ["a", "<img src=x>"], "commit": "c0ffee", "world_size": 2, "versions": {"torch": "2.13.0"}})
    )
    return folder


def write_events(folder: Path, *events: dict, start: float = 1_700_000_000.0) -> None:
    """events.jsonl; "after" is a time in seconds from the first event."""
    lines = [json.dumps({"time": start + event.pop("after", 0.0), "session": "s", **event}) for event in events]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
