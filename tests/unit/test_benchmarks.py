"""benchmarks/run.py in its smallest form: every row is there and its figures make sense. How large they are is not tested."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP_ROWS = [
    "feature transform",
    "slot attention + predictor",
    "decoder forward",
    "feature reconstruction",
    "SSync selection + losses",
    "slot contrast",
    "backward",
    "optimizer",
    "rest of the step",
    "whole step",
]
FIGURES = ("cpu_ms", "wall_ms", "share", "peak_mib", "clips_per_s", "mb_per_s", "ratio")


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=os.environ)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(stdout, JSON) of one quick run."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    result = run_benchmarks("--quick", "--no-ranks", "--device", "cpu", "--json", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, json.loads(path.read_text())


def section(report, start: str) -> list[dict]:
    return [row for row in report[1]["rows"] if row["section"].startswith(start)]


def test_every_part_of_a_step_is_there_and_the_shares_are_a_whole(report):
    rows = section(report, "training step")
    assert [row["name"] for row in rows] == STEP_ROWS
    assert sum(row["share"] for row in rows[:-1]) == pytest.approx(1.0, abs=1e-6)
    assert rows[-1]["share"] == 1.0
    assert all(row["wall_ms"] <= rows[-1]["wall_ms"] for row in rows)


def test_every_figure_is_positive(report):
    figures = [(row["name"], key, row[key]) for row in report[1]["rows"] for key in FIGURES if row[key] is not None]
    assert len(figures) > 40
    # the process may have what a step needs in hand already
    unsound = [one for one in figures if not (math.isfinite(one[2]) and one[2] > 0) and "resident" not in one[0]]
    assert not unsound


def test_memory_rows_are_there(report):
    names = [row["name"] for row in section(report, "memory of a step")]
    assert names == ["tensors", "resident memory of the process", "for comparison: parameters"]


def test_memory_of_ssync_grows_linearly(report):
    """Counted by the allocator, so the same on every machine."""
    rows = section(report, "SSync")
    assert [row["name"].split("  ")[0] for row in rows] == ["T*P = 32", "T*P = 256", "T*P = 2048"]
    assert rows[-1]["ratio"] == pytest.approx(1.0, abs=0.1)


def test_loader_stands_beside_a_copy_and_webdataset(report):
    rows = section(report, "loading")
    assert [row["name"] for row in rows] == ["ClipLoader", "for comparison: copy in memory", "for comparison: stock webdataset"]
    assert all(row["clips_per_s"] and row["mb_per_s"] for row in rows)
    assert [row["ratio"] is not None for row in rows] == [False, True, True]


def test_the_table_prints_what_the_file_holds(report):
    text, figures = report
    lines = text.splitlines()
    assert all(figures["machine"][key] in lines[0] for key in ("cpu", "torch", "python"))
    assert "1 thread " in lines[0]
    assert all(any(line.startswith(f"  {row['name']} ") for line in lines) for row in figures["rows"])
    assert all(row["section"] in lines for row in figures["rows"])
    assert lines[-len(figures["notes"]) :] == figures["notes"]


def test_help_is_quick():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "benchmarks/run.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "deepspeed", "numpy", "hydra", "webdataset"}


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "movi_z"], ["--steps", "0"], ["--device", "tpu"], ["--json", "no_such_folder/figures.json"]],
    ids=" ".join,
)
def test_a_wrong_option_is_refused_in_a_line(arguments):
    result = run_benchmarks(*arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr.splitlines()[-1]
    assert not result.stdout


@pytest.mark.slow
def test_rank_rows():
    from benchmarks import rank_cost

    rows = rank_cost.rows(rounds=2, zero_stage=1)
    assert [row.name for row in rows] == ["1 rank", "2 ranks"]
    assert all(row.wall_ms and row.wall_ms > 0 and row.cpu_ms and row.cpu_ms > 0 for row in rows)
    assert rows[1].ratio == pytest.approx(rows[1].wall_ms / rows[0].wall_ms)


def test_growth_exponent():
    from benchmarks.ssync_cost import growth_exponent

    sizes = [10, 40, 90]
    assert growth_exponent(sizes, [3.0 * size for size in sizes]) == pytest.approx(1.0)
    assert growth_exponent(sizes, [0.5 * size**2 for size in sizes]) == pytest.approx(2.0)


def test_table_is_aligned():
    from benchmarks.table import Row, render

    rows = [
        Row(section="one", name="short", cpu_ms=0.0123, share=0.256, beside="what is beside"),
        Row(section="one", name="a longer name", cpu_ms=12345.6, wall_ms=1.5),
        Row(section="two", name="third", peak_mib=150.25),
    ]
    lines = render(rows).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["one", "two"]
    words = ("CPU ms", "0.012", "12,346")
    ends = {line.index(word) + len(word) for line, word in zip(lines[:1] + lines[2:4], words, strict=True)}
    assert len(ends) == 1
    assert "25.6 %" in lines[2] and "1.50" in lines[3] and lines[5].rstrip().endswith("150.2")


def test_peak_of_tensors_counts_what_lives_at_once():
    import torch

    from benchmarks.measure import peak_of_tensors

    def call() -> None:
        first = torch.zeros(3000, dtype=torch.float64)
        second = first + 1  # two live here
        del first
        third = second * 2  # and two here
        del second, third

    peak = peak_of_tensors(call, torch.device("cpu"))
    assert peak.largest_block == 24000
    assert 48000 <= peak.bytes < 48000 + 200  # and a scalar or two


def test_peak_resident_bytes_sees_memory_that_is_given_back():
    import numpy as np

    from benchmarks.measure import peak_resident_bytes

    def call() -> None:
        np.ones(64 * 2**20, dtype=np.uint8)

    grown, reset = peak_resident_bytes(call)
    assert grown > 60 * 2**20 or not reset
