"""The report: one page that parses, needs nothing else, shows every score, says what is missing, and trusts no name."""

from __future__ import annotations

import json
import re

import pytest
from html_page import HOSTILE, Page, video, write_run

from trainer.report.page import write_report

PUBLISHED = (
    "published: {source: 'Paper <b> on X', percent: {video_fg_ari: 79.4, video_mbo: 39.5}, plus_minus: {video_fg_ari: 0.6}}\n"
)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo & <b>run")


def read(run, gallery=()) -> Page:
    return Page(write_report(run, gallery).read_text(encoding="utf-8"))


def test_every_score_stands_beside_its_baselines(run):
    page = read(run)
    assert page.row("model") == ["45.7", "–", "12.3"] and page.row("model, attention maps")[0] == "38.9"
    assert page.row("k-means on the same features")[0] == "54.3" and page.row("grid of blocks")[0] == "20.2"
    assert page.row("a<i>") == ["–", "11.1", "–"]


def test_the_published_scores_stand_between_model_and_baselines(tmp_path):
    page = read(write_run(tmp_path / "run", published=PUBLISHED))
    assert page.row("published: Paper <b> on X") == ["79.4 ± 0.6", "39.5", "–"]
    names = [row[0] for row in page.rows]
    assert names.index("model") < names.index("published: Paper <b> on X") < names.index("grid of blocks")
    assert "<b>54.3</b>" in page.content and "<b>79.4" not in page.content  # the best of those scored here


def test_published_scores_are_shown_before_any_evaluation_too(tmp_path):
    run = write_run(tmp_path / "run", published=PUBLISHED)
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss/total": 2.0}\n')
    page = read(run)
    assert "No evaluation was logged." in page.words and page.row("published: Paper <b> on X") == ["79.4 ± 0.6", "39.5"]


def test_a_later_evaluation_has_a_table_of_its_own(run):
    record = {"step": 150, "shards": "data/y", "split": "test", "videos": 7, "scores": {"video_fg_ari": 0.61}}
    (run / "evaluation.json").write_text(json.dumps(record | {"baselines": {"grid": {"video_fg_ari": 0.22}}}))
    page = read(run)
    assert "Scored again: step 150, 7 videos of data/y/test" in page.words
    assert [row[1] for row in page.rows if row[0] in ("model", "grid of blocks")] == ["45.7", "20.2", "61.0", "22.0"]


def test_nothing_is_fetched_and_nothing_is_run(run):
    read(run, [video()]).needs_nothing()


def test_names_are_escaped(run):
    (run / "attempts" / "1").mkdir(parents=True)
    (run / "attempts" / "1" / "verdict.json").write_text(json.dumps({"outcome": "failed", "last_lines": [HOSTILE], "rank": 0}))
    (run / "events.jsonl").write_text(json.dumps({"event": "hang", "time": 1.0, "why": HOSTILE}) + "\n")
    page = read(run, [video(key='<svg onload="x">')])
    tags = {tag for tag, _ in page.seen}
    assert "script" not in tags and not any("onload" in attributes for _, attributes in page.seen)
    assert "demo & <b>run" in page.text and HOSTILE in "".join(page.text) and '<svg onload="x">' in "".join(page.text)


def test_each_curve_is_an_image_with_words(run):
    labels = [attributes["aria-label"] for attributes in read(run).all("svg", role="img")]
    assert any(label.startswith("Loss: total from 0.1 at step 10 to 0.005 at step 200") for label in labels)
    assert any("Learning rate" in label for label in labels) and any("slot contrast" in label for label in labels)


def test_the_time_of_a_step_adds_up(run):
    page = read(run)
    assert page.row("forward") == ["40", "40.0 %"] and page.row("waiting for data") == ["5", "5.0 %"]
    assert page.row("the rest: logging, saving, bookkeeping") == ["10", "10.0 %"]


def test_memory_and_data_are_told(run):
    page = read(run)
    assert page.row("most at once, rank 0")[0].startswith("1.250 GiB")
    assert page.row("clips taken") == ["1,600 in 200 updates"] and page.row("epoch reached") == ["2 (0 is the first)"]
    assert page.row("damaged samples replaced")[0].startswith("2 on rank 0")
    assert page.row("order hash")[0].startswith("none: the order was not recorded")


def test_the_data_stream_of_the_newest_checkpoint_is_told(run):
    for step, version in ((100, "old"), (200, "abc123")):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        position = {"dataset_version": version, "seed": 5, "global_batch": 8, "position": 8 * step}
        (folder / "state.json").write_text(json.dumps({"train": {"step": step, "position": position}}))
    page = read(run)
    assert page.row("data set version") == ["abc123"]
    assert page.row("stream, at the newest checkpoint")[0].startswith("position 1600, seed 5, 8 clips an update")


def test_an_empty_run_folder_still_gives_a_page_with_a_line_for_each_missing_part(tmp_path):
    words = read(tmp_path / "fresh").words
    for line in (
        "nothing logged yet", "No evaluation was logged.", "No pictures:", "No step was logged.",
        "No times of steps were logged.", "No memory was logged.", "Nothing is known of attempts",
        "config.yaml is not in the run folder.",
        "provenance.json is not in the run folder.", "Neither config.yaml nor a checkpoint says",
    ):  # fmt: skip
        assert line in words


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("config.yaml", b"a: [1, 2", "config.yaml is not a mapping of settings"),
        ("config.yaml", b"- just\n- a list\n", "config.yaml is not a mapping of settings"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml cannot be read"),
        ("provenance.json", b"{", "provenance.json is not JSON"),
        ("evaluation.json", b'{"step": ', "evaluation.json is not JSON"),
        ("metrics.jsonl", b"no\n{}\n", "the run log cannot be read"),
        ("report/video_00_x.npz", b"PK rubbish", "report/video_00_x.npz cannot be shown"),
        ("order/rank0.jsonl", b'{"step": 1}\n', "order/ cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(run, name, content, line):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(content)
    page = read(run)
    assert line in page.words and "How it was made" in page.words


def test_a_log_that_was_cut_short_by_a_kill_is_no_problem(run):
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 210, "loss/to')
    assert "cannot be read" not in read(run).words


def test_finished_and_unfinished_runs_say_so(run):
    assert "still going, 200 updates" in read(run).words  # its last line is seconds old
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"time": \d+', '"time": 1000', log))
    assert "not finished, and no longer going, 200 updates" in read(run).words
    (run / "DONE").touch()
    assert "Slotstream run, finished, 200 updates" in read(run).words


def test_page_tells_readers_its_language_and_width_and_suits_dark_rooms(run):
    page = read(run)
    assert page.all("html", lang="en") and page.all("meta", name="viewport")
    assert all("scope" in attributes for tag, attributes in page.seen if tag == "th")
    assert "prefers-color-scheme:dark" in page.content
    headings = [attributes["id"] for attributes in page.all("h2")]
    assert len(headings) == len(set(headings)) == 8


def test_provenance_shows_the_command_and_the_versions(run):
    page = read(run)
    assert (
        page.row("command") == ["a <img src=x>"] and page.row("versions.torch") == ["2.13.0"] and page.row("commit") == ["c0ffee"]
    )
