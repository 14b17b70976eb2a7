"""The report of a real run: what training writes, what it says of one that was killed and went on, and how a browser takes it."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.integration.ranks import ROOT, finish, start_ranks
from tests.integration.tiny_run import arguments, make_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from html_page import Page, write_events

from trainer.report.compare import write_comparison
from trainer.report.page import write_report

PUBLISHED = ("published.source=Paper", "published.percent.video_fg_ari=79.4")
WITH_REPORT = ("observe.report=true", "evaluate.at_end=true", "evaluate.every_steps=4", "observe.report_videos=2", *PUBLISHED)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (390, 1300)  # pixels: a phone held upright, a window on a desk


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs of ten updates with three validation videos: one on two ranks, one on one with another rate."""
    root = tmp_path_factory.mktemp("report")
    data = make_shards(root / "data")
    for name, world, more in (("two_ranks", 2, ()), ("other_rate", 1, ("optim.lr=0.001",))):
        codes = finish(start_ranks(world, arguments(data, root, name, *WITH_REPORT, *more), root / f"logs_{name}"))
        assert codes == [0] * world, (root / f"logs_{name}" / "rank0.err").read_text()[-2000:]
    return root


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_training_ends_with_a_page_that_has_every_part(runs):
    page = page_of(runs / "two_ranks" / "report" / "index.html")
    page.needs_nothing()
    assert "Slotstream run, finished, 10 updates" in page.words
    assert len(page.row("model")) >= 4 and page.row("published: Paper")[0] == "79.4"
    assert page.row("videos in them") == ["6"] and page.row("clips taken") == ["40 in 10 updates"]
    assert re.fullmatch(r"[0-9a-f]{64} \(40 clips of 10 updates\)", page.row("order hash")[0])
    assert float(page.row("forward")[0]) > 0 and page.row("most at once, rank 0")
    for line in ("was not recorded", "No evaluation", "No step", "No pictures", "not in the run folder", "cannot be"):
        assert line not in page.words
    assert "No events.jsonl: the launcher did not start this run" in page.words


def test_the_best_and_the_worst_video_of_both_ranks_are_shown(runs):
    page = page_of(runs / "two_ranks" / "report" / "index.html")
    captions = re.findall(r"<figcaption>((?:best|worst) of 3 · [^<]+)</figcaption>", page.content)
    assert len(captions) == 2 and captions[0].startswith("best of 3") and captions[1].startswith("worst of 3")
    best, worst = (
        sum(map(float, re.findall(r"([\d.-]+) %", html.unescape(caption)))) for caption in captions
    )  # of FG-ARI and mBO
    assert best > worst
    shown = [image["alt"].partition(" of video")[0] for image in page.all("img")]
    assert shown == 2 * ["frames", "ground truth", "attention maps", "object maps", "attention, merged", "object, merged",
                         "boundary set", "interior set"]  # fmt: skip


def test_two_ranks_and_one_show_the_same_video_when_they_hold_the_same_model(runs):
    """The choice is made over all ranks: it does not depend on who scored what."""
    folder = runs / "again"
    for world in (1, 2):
        target = folder / f"w{world}" / "two_ranks"
        shutil.copytree(runs / "two_ranks", target, ignore=shutil.ignore_patterns("report", "DONE"))
        words = arguments(runs / "data", folder / f"w{world}", "two_ranks", *WITH_REPORT)
        assert finish(start_ranks(world, words, folder / f"logs{world}")) == [0] * world
    shown = [
        [image["alt"] for image in page_of(folder / f"w{world}" / "two_ranks" / "report" / "index.html").all("img")]
        for world in (1, 2)
    ]
    assert shown[0] == shown[1] and len(shown[0]) == 16


def test_a_page_written_anew_shows_the_same(runs):
    index = runs / "two_ranks" / "report" / "index.html"
    before = index.read_text()
    line = [sys.executable, "-m", "trainer.report", str(index.parents[1])]
    assert subprocess.run(line, cwd=ROOT, timeout=120, check=False).returncode == 0
    assert _without_date(index.read_text()) == _without_date(before)


def test_a_report_that_cannot_be_written_does_not_fail_the_run(runs):
    folder = runs / "blocked"
    folder.mkdir()
    (folder / "report").write_text("a file where the folder should be")
    words = arguments(runs / "data", runs, "blocked", *WITH_REPORT)
    assert finish(start_ranks(1, words, runs / "logs_blocked")) == [0]
    assert "warning: the report cannot be written" in (runs / "logs_blocked" / "rank0.err").read_text()
    assert (folder / "DONE").exists()


def test_a_killed_rank_stands_on_the_timeline_of_a_launched_run(runs):
    command = arguments(runs / "data", runs, "killed", "optim.max_steps=400", "checkpoint.every_steps=5", *WITH_REPORT)[2:]
    launch = [sys.executable, "cluster/launch.py", "--gpus-per-node", "0", "--ranks-per-node", "2", "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(runs / "launch.log", "w") as log:
        launcher = subprocess.Popen([*launch, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _kill_a_rank(runs / "killed")
        assert launcher.wait(240) == 0, (runs / "launch.log").read_text()[-3000:]
    finally:
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()
    page = page_of(write_report(runs / "killed"))
    assert "2 attempts, 1 failed; 1 restart" in page.words and "was killed by SIGKILL" in page.words
    assert 'class="mark trouble"' in page.content and 'class="bar bad"' in page.content
    assert re.fullmatch(r"[0-9a-f]{64} \(1,600 clips of 400 updates\)", page.row("order hash")[0])


def _kill_a_rank(run: Path) -> None:
    """Kill rank 1 once there is a checkpoint to go on from."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = _rank_process(run, 1) if list(run.glob("checkpoints/step_*/manifest.json")) else None
        if found is not None:
            os.kill(found, 9)
            return
        time.sleep(0.05)
    raise AssertionError("no rank to kill came up")


def _rank_process(run: Path, rank: int) -> int | None:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if {f"RANK={rank}".encode(), f"SLOTSTREAM_RUN_DIR={run}".encode()} <= set(words):
            return int(entry.name)
    return None


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_a_browser_has_nothing_to_complain_of_and_no_page_is_wider_than_the_window(runs, tmp_path):
    """A faulty run, and a comparison with a third one that has nothing: the longest lines and the widest tables."""
    why = "rank 1 has been in the collective 12 of step 400 for 40 s " * 3
    write_events(runs / "other_rate", {"event": "attempt", "attempt": 1, "nodes": 1, "ranks": 1},
                 *({"event": "hang", "attempt": 1, "why": why, "after": float(after)} for after in range(30)))  # fmt: skip
    (runs / "empty_run_with_a_rather_long_name_that_a_person_gave_it" / "attempts").mkdir(parents=True)
    folders = [runs / "two_ranks", runs / "other_rate", runs / "empty_run_with_a_rather_long_name_that_a_person_gave_it"]
    pages = [write_report(folder) for folder in folders] + [write_comparison(folders, tmp_path / "comparison.html")]
    for page in pages:
        widths, complaints = _in_a_browser(page, tmp_path)
        assert complaints == [], page
        assert widths == list(WIDTHS), f"{page}: {widths}"


def _in_a_browser(page: Path, folder: Path) -> tuple[list[int], list[str]]:
    """(how wide the page is in windows of WIDTHS, what the console said), measured by a page of ours around it."""
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{html.escape(page.read_text())}"></iframe>'
        for width in WIDTHS
    )
    script = (
        "onload = () => document.title = 'widths ' + "
        "[...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth).join(' ')"
    )
    around = folder / "around.html"
    around.write_text(f'<!doctype html><meta charset="utf-8"><title>x</title>{frames}<script>{script}</script>')
    with tempfile.TemporaryDirectory() as profile:
        line = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--dump-dom",
        ]
        line += [f"--user-data-dir={profile}", "--window-size=1800,900", around.as_uri()]
        result = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"<title>widths ([\d ]+)</title>", result.stdout)
    assert found, result.stderr[-2000:]
    return [int(width) for width in found[1].split()], [text for text in result.stderr.splitlines() if "CONSOLE" in text]


def _without_date(page: str) -> str:
    return re.sub(r"Written [\d: -]+ UTC", "", page)
