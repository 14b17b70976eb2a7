"""The report: one page that parses, needs nothing else, shows every score, and trusts no name."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from trainer.observe.curves import line_chart, linear_ticks, thin, tick_text
from trainer.observe.report import GalleryItem, write_report
from trainer.observe.run_log import RunLog

VOID = {"meta", "img", "br", "line", "circle", "path", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, attributes and tags."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def video(key: str = "clip_7", scores: dict | None = None) -> GalleryItem:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, (3, 6))
    return GalleryItem(
        key=key,
        frames=generator.integers(0, 255, (3, 8, 12, 3), dtype=np.uint8),
        truth=generator.integers(0, 3, (3, 8, 12)),
        attn_labels=labels,
        object_labels=labels,
        merged_attn_labels=labels,
        merged_object_labels=labels,
        boundary=labels > 1,
        interior=labels < 1,
        grid=(2, 3),
        scores=scores or {},
    )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo & <b>run"
    with RunLog(folder / "metrics.jsonl") as log:
        for step in range(10, 210, 10):
            log.write(step, {"loss/total": math.nan if step == 50 else 1 / step, "loss/slot_contrast": 2.0, "optim/lr": 1e-3})
        log.write(200, {"metric/video_fg_ari": 0.4567, "metric/frame_mbo": 0.1234, "metric/attn_video_fg_ari": 0.3891})
        log.write(200, {"baseline/k_means/video_fg_ari": 0.5432, "baseline/grid/video_fg_ari": 0.2019})
        log.write(200, {"baseline/a<i>/video_mbo": 0.111})
    (folder / "config.yaml").write_text("name: '<script>alert(1)</script>'\n")
    (folder / "provenance.json").write_text('{"command": ["a", "<img src=x>"], "versions": {"torch": "2.13.0"}}')
    return folder


def read(run, gallery=()) -> tuple[str, Page]:
    content = write_report(run, gallery).read_text(encoding="utf-8")
    return content, Page(content)


def test_every_score_stands_beside_its_baselines(run):
    _, page = read(run)
    text = " ".join(page.text)
    for value in ("45.7", "12.3", "38.9", "54.3", "20.2", "11.1"):
        assert value in text
    assert "k-means on the same features" in text and "grid of blocks" in text and "model, attention maps" in text


def test_nothing_is_fetched_and_nothing_is_run(run):
    content, page = read(run, [video()])
    assert not re.findall(r"https?://|//cdn|@import|url\(", content)
    assert "script" not in {tag for tag, _ in page.seen} and "link" not in {tag for tag, _ in page.seen}
    for _, attributes in page.seen:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_names_are_escaped(run):
    _, page = read(run, [video(key='<svg onload="x">')])
    tags = [tag for tag, _ in page.seen]
    assert "script" not in tags and "i" not in tags
    assert "demo & <b>run" in page.text and "<script>alert(1)</script>" in "".join(page.text)
    assert '<svg onload="x">' in page.text


def test_pictures_are_in_the_page_and_beside_it(run):
    _, page = read(run, [video("one"), video("two/../x", {"video_fg_ari": 0.765, "frame_mbo": None})])
    images = [attributes for tag, attributes in page.seen if tag == "img"]
    assert len(images) == 2 and all(image["alt"] and image["src"].startswith("data:image/") for image in images)
    assert len(list((run / "report").glob("*.png"))) == 2 and "76.5" in " ".join(page.text)


def test_a_second_report_without_a_gallery_keeps_the_pictures(run):
    read(run, [video("one")])
    _, page = read(run)
    assert sum(tag == "img" for tag, _ in page.seen) == 1
    read(run, [video("other")])
    assert [path.name for path in (run / "report").glob("*.png")] == ["video_00_other.png"]


def test_each_curve_is_an_image_with_words(run):
    _, page = read(run)
    labels = [attributes["aria-label"] for tag, attributes in page.seen if tag == "svg" and "aria-label" in attributes]
    assert any(label.startswith("Loss: total from 0.1 at step 10 to 0.005 at step 200") for label in labels)
    assert any("Learning rate" in label for label in labels) and any("slot contrast" in label for label in labels)


def test_an_empty_run_folder_still_gives_a_page(tmp_path):
    _, page = read(tmp_path / "fresh")
    text = " ".join(page.text)
    assert "nothing logged yet" in text and "No evaluation was logged." in text and "not in the run folder" in text


def test_finished_and_unfinished_runs_say_so(run):
    assert "not finished, 200 updates" in read(run)[0]
    (run / "DONE").touch()
    assert "Slotstream run, finished, 200 updates" in read(run)[0]


def test_page_tells_readers_its_language_and_width(run):
    _, page = read(run)
    assert ("html", {"lang": "en"}) in page.seen
    assert any(attributes.get("name") == "viewport" for _, attributes in page.seen)
    assert all("scope" in attributes for tag, attributes in page.seen if tag == "th")


def test_a_gap_breaks_the_line_and_no_coordinate_is_nan():
    svg = line_chart("x", [("a", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 3.0), (6, 2.0)])])
    (path,) = re.findall(r'<path d="([^"]+)"', svg)
    assert path.count("M") == 3 and path.count("L") == 2 and "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize(
    "points", [[(5, 0.0)], [(0, 2.0), (9, 2.0)], [(1, -1e-9), (2, 1e9)], [(1, 1e-7), (2, 5.0)], [(0, -3.0), (1, -3.0)]]
)
def test_awkward_values_stay_inside_the_picture(points):
    svg = line_chart("x", [("a", points)])
    numbers = [float(number) for path in re.findall(r'<path d="([^"]+)"', svg) for number in re.findall(r"-?\d+\.\d", path)]
    assert numbers and min(numbers) >= 0 and max(numbers[0::2]) <= 440 and max(numbers[1::2]) <= 230


def test_a_chart_of_nothing_is_nothing():
    assert line_chart("x", []) == "" and line_chart("x", [("a", [(1, math.nan)])]) == ""


def test_long_curves_are_thinned_by_means():
    points = [(step, float(step % 2)) for step in range(10_000)]
    short = thin(points, 100)
    assert len(short) <= 101 and short[-1] == (9999, 1.0) and all(0.4 < value < 0.6 for _, value in short[:-1])
    assert thin(points[:50], 100) == points[:50]


def test_ticks_are_round():
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and linear_ticks(3, 1003) == [200, 400, 600, 800, 1000]
    assert [tick_text(value) for value in (0, 0.25, 1500, 40_000, 2e6, 4e-5)] == ["0", "0.25", "1500", "40k", "2M", "4e-5"]
