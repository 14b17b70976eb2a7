"""Several runs on one page: what differs, scores beside one another, curves over one another; and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from html_page import HOSTILE, Page, video, write_run

from trainer.report.compare import differences, names_of, write_comparison
from trainer.report.data_use import read_order
from trainer.report.page import write_report

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = "published: {source: Paper on X, percent: {video_fg_ari: 79.4}}\n"


@pytest.fixture
def runs(tmp_path):
    one = write_run(tmp_path / "one", steps=200, published=PUBLISHED)
    two = write_run(tmp_path / "two <i>", steps=100, published="objective: {weight: 0.5}\n")
    config = (two / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.002")
    (two / "config.yaml").write_text(config)
    return [one, two]


def compared(runs, tmp_path) -> Page:
    return Page(write_comparison(runs, tmp_path / "comparison.html").read_text(encoding="utf-8"))


def test_settings_that_differ_are_listed_and_only_those(runs, tmp_path):
    page = compared(runs, tmp_path)
    assert page.row("optim.lr") == ["0.001", "0.002"] and page.row("optim.max_steps") == ["200", "100"]
    assert page.row("objective.weight") == ["–", "0.5"]
    assert not [row for row in page.rows if row and row[0] in ("data.root", "name", "optim.global_batch")]


def test_scores_stand_beside_one_another_with_the_published_ones(runs, tmp_path):
    page = compared(runs, tmp_path)
    assert page.row("one")[0] == "45.7" and page.row("two <i>")[0] == "45.7"
    assert page.row("one, attention maps")[0] == "38.9" and page.row("published: Paper on X")[0] == "79.4"


def test_curves_lie_over_one_another(runs, tmp_path):
    page = compared(runs, tmp_path)
    (loss,) = [a["aria-label"] for a in page.all("svg", role="img") if a["aria-label"].startswith("Loss: total:")]
    assert "one from 0.1 at step 10 to 0.005 at step 200" in loss and "two <i> from 0.1 at step 10 to 0.01 at step 100" in loss


def test_the_page_needs_nothing_and_trusts_no_name(runs, tmp_path):
    write_report(runs[0], [video(HOSTILE), video("b"), video("c")])
    page = compared(runs, tmp_path)
    page.needs_nothing()
    assert HOSTILE in "".join(page.text) and len(page.all("img")) == 16  # first and last of three videos
    boxes = [attributes["id"] for attributes in page.all("input")]
    assert len(boxes) == len(set(boxes)) == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    assert names_of([Path("/a/x/demo"), Path("/a/y/demo")]) == ["x/demo", "y/demo"]
    assert names_of([Path("/a/demo"), Path("/a/other")]) == ["demo", "other"]
    same = [write_run(tmp_path / place / "demo") for place in ("x", "y")]
    page = compared(same, tmp_path)
    assert page.row("x/demo") == page.row("y/demo") and "All settings are the same." in page.words


def test_a_run_with_nothing_in_it_does_not_spoil_the_page(runs, tmp_path):
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    page = compared([*runs, empty], tmp_path)
    assert "not started, nothing logged yet" in page.row("state")[2] and "Without a readable config.yaml: empty." in page.words
    assert "empty (none)" in page.words


def test_differences_know_a_missing_key_from_an_empty_one():
    found = differences({"a": {"x": None, "y": 1, "z": [1]}, "b": {"y": 1.0, "z": [1]}})
    assert found == {"x": {"a": None}, "y": {"a": 1, "b": 1.0}}


def record(folder: Path, **ranks: list[tuple[int, list[int], list[int]]]) -> Path:
    folder.mkdir(parents=True)
    for rank, lines in ranks.items():
        text = [json.dumps({"step": step, "ids": ids, "positions": positions}) for step, ids, positions in lines]
        (folder / f"{rank}.jsonl").write_text("\n".join(text) + "\n")
    return folder


def test_the_order_hash_is_that_of_the_stream_whatever_the_number_of_ranks(tmp_path):
    one = record(tmp_path / "one", rank0=[(1, [5, 3, 9], [0, 1, 2]), (2, [4, 1, 7], [3, 4, 5])])
    two = record(tmp_path / "two", rank0=[(1, [5, 9], [0, 2]), (2, [1], [4])], rank1=[(1, [3], [1]), (2, [4, 7], [3, 5])])
    other = record(tmp_path / "other", rank0=[(1, [5, 9, 3], [0, 1, 2]), (2, [4, 1, 7], [3, 4, 5])])
    first, second = read_order(one), read_order(two)
    assert first == second and first is not None and (first.clips, first.steps, first.whole) == (6, 2, True)
    assert read_order(other).sha256 != first.sha256  # type: ignore[union-attr]


def test_updates_that_the_record_lacks_are_noticed(tmp_path):
    found = read_order(record(tmp_path / "gap", rank0=[(1, [5], [0]), (3, [4], [2])]))
    assert found is not None and not found.whole
    assert read_order(tmp_path / "nothing") is None


def command(*words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "trainer.report", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_one_page_or_a_comparison(runs, tmp_path):
    alone = command(runs[0])
    assert alone.returncode == 0 and f"written: {runs[0]}/report/index.html" in alone.stdout, alone.stderr
    both = command(*runs)
    assert both.returncode == 0 and (tmp_path / "comparison.html").is_file(), both.stderr
    there = command(*runs, "--out", tmp_path / "new" / "page.html")
    assert there.returncode == 0 and "2 runs compared" in (tmp_path / "new" / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{tmp}/nothing"], "error: run={tmp}/nothing; none of config.yaml"),
        (["{tmp}/one", "{tmp}/one"], "is given twice"),
        (["{tmp}/one", "--out", "{tmp}"], "is a folder; the page is one file"),
        (["{tmp}/one", "--out", "{tmp}/one/config.yaml/page.html"], "error: the page cannot be written"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, words, line):
    write_run(tmp_path / "one")
    result = command(*(word.format(tmp=tmp_path) for word in words))
    assert result.returncode in (1, 2) and line.format(tmp=tmp_path) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
