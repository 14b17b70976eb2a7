"""The gallery: the best and the worst by score, as animations that need nothing but the page."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from html_page import Page, video, write_run
from PIL import Image

from trainer.report.choice import Candidates, best_and_worst, merit
from trainer.report.gallery import place_words
from trainer.report.page import write_report
from trainer.report.render import rows_of


def page_of(run, gallery=()) -> Page:
    return Page(write_report(run, gallery).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_best_and_worst_are_half_each_and_the_best_have_the_odd_one():
    merits = {0: 0.5, 1: 0.9, 2: 0.1, 3: None, 4: 0.7, 5: 0.2}
    assert best_and_worst(merits, 4) == [1, 4, 5, 2] and best_and_worst(merits, 3) == [1, 4, 2]
    assert best_and_worst(merits, 1) == [1] and best_and_worst(merits, 0) == [] and best_and_worst(merits, 9) == [1, 4, 0, 5, 2]
    assert best_and_worst({7: None, 3: None}, 1) == [3] and best_and_worst({2: 0.5, 1: 0.5}, 1) == [1]


def test_a_video_without_an_object_has_no_merit():
    """Its FG-ARI counts as 1 by the released rule: it would lead every list."""
    assert merit({"video_fg_ari": 1.0, "video_mbo": None}) is None and merit({}) is None
    assert merit({"video_fg_ari": 0.4, "video_mbo": 0.2}) == pytest.approx(0.3)


@pytest.mark.parametrize("num_shown", [1, 2, 4, 5])
def test_few_pictures_are_held_and_none_that_is_shown_is_missing(num_shown):
    """Whatever the order in which the videos pass, and however they lie on the ranks."""
    generator = np.random.default_rng(num_shown)
    merits = {number: None if number % 7 == 3 else float(generator.integers(0, 20)) / 20 for number in range(40)}
    ranks = [Candidates[str](num_shown) for _ in range(3)]
    drawn: list[int] = []
    for number in generator.permutation(40).tolist():
        ranks[number % 3].offer(number, merits[number], lambda: drawn.append(1) or "picture")
        assert all(len(rank.pictures) <= num_shown for rank in ranks)
    held = {number for rank in ranks for number in rank.pictures}
    assert set(best_and_worst(merits, num_shown)) <= held and len(drawn) < 40


def test_places_are_named_from_the_nearer_end():
    words = [place_words(video(place=place, num_videos=40)) for place in (1, 2, 3, 38, 39, 40)]
    assert words[:3] == ["best of 40", "2nd best of 40", "3rd best of 40"]
    assert words[3:] == ["3rd worst of 40", "2nd worst of 40", "worst of 40"] and place_words(video()) == ""


def test_every_thing_of_a_video_is_an_animation_over_its_frames(run):
    item = video("one", {"video_fg_ari": 0.765, "video_mbo": 0.4, "frame_mbo": 0.9}, frames=5, place=1, num_videos=3)
    page = page_of(run, [item])
    images = page.all("img")
    rows = rows_of(item, list(range(5)))
    assert len(images) == len(rows) == 8 and all(image["alt"].endswith("of video one, 5 frames") for image in images)
    for image, row in zip(images, rows, strict=True):
        strip = Image.open(BytesIO(base64.b64decode(image["src"].partition("base64,")[2])))
        height, width = row.cells.shape[1:3]
        assert strip.format == "WEBP" and strip.size == (5 * width, height)
        wanted = np.concatenate(list(row.cells), axis=1).astype(float)
        assert np.abs(np.asarray(strip.convert("RGB")) - wanted).mean() < 40  # lossy; the exact ones lie beside the page
    assert {attributes["style"].split(";")[0] for attributes in page.all("div", class_="panel")} == {"--n:5"}
    assert "best of 3 · one · video FG-ARI 76.5 %, video mBO 40.0 %" in page.words and "90.0" not in page.words


def test_an_animation_can_be_stopped_without_a_script(run):
    page = page_of(run, [video("one"), video("two")])
    boxes = [attributes["id"] for attributes in page.all("input", type="checkbox")]
    assert len(boxes) == len(set(boxes)) == 2 == len(page.all("label"))
    assert {attributes["for"] for attributes in page.all("label")} == set(boxes)
    assert "prefers-reduced-motion" in page.content


def test_a_single_image_does_not_move(run):
    assert not page_of(run, [video("one", frames=1)]).all("input")


def test_a_second_report_without_a_gallery_shows_the_same_videos(run):
    first = page_of(run, [video("a/../b", {"video_fg_ari": 0.5}, place=1, num_videos=2), video("two", place=2, num_videos=2)])
    second = page_of(run)
    assert [image["src"] for image in second.all("img")] == [image["src"] for image in first.all("img")] != []
    assert "best of 2 · a/../b · video FG-ARI 50.0 %" in second.words
    page_of(run, [video("other")])
    names = sorted(path.name for path in (run / "report").iterdir())
    assert names == ["index.html", "video_00_other.npz", "video_00_other.png"]


def test_stored_videos_hold_no_pickles(run):
    page_of(run, [video("one")])
    with np.load(run / "report" / "video_00_one.npz", allow_pickle=False) as content:
        assert json.loads(str(content["about"]))["key"] == "one" and content["frames"].dtype == np.uint8


def test_a_long_large_video_stays_small_on_the_page(run):
    noise = np.random.default_rng(1).integers(0, 255, (60, 90, 160, 3), dtype=np.uint8)
    item = replace(video("noise", frames=60), frames=noise)
    size = len(page_of(run, [item]).content)
    assert size < 3_000_000  # noise is the worst that a picture can be
