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
    "decoder",
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
    assert len({row["section"] for row in rows}) == 2
    for five, codec in ((rows[:5], "float16"), (rows[5:], "int8")):
        assert [row["name"] for row in five] == [
            "ClipLoader", "  without checksums", "for comparison: copy in memory", "for comparison: stock webdataset",
            "size and error",
        ]  # fmt: skip
        assert all(row["clips_per_s"] and row["mb_per_s"] and row["section"].endswith(codec) for row in five[:4])
        assert [row["ratio"] is not None for row in five] == [False, False, True, True, True]
    assert rows[4]["ratio"] == 1 and rows[9]["ratio"] == pytest.approx(0.5 + 1 / 10)  # tiny tokens: a scale is a tenth of one


def test_updates_with_and_without_recording_stand_side_by_side(report):
    plain, recorded, alone, line, scrape = section(report, "recording")
    assert plain["cpu_ms"] > 0 and recorded["ratio"] == pytest.approx(recorded["cpu_ms"] / plain["cpu_ms"], rel=0.5)
    assert 0 < alone["share"] == pytest.approx(alone["cpu_ms"] / plain["cpu_ms"], rel=0.5)
    assert alone["cpu_ms"] < plain["cpu_ms"] and line["cpu_ms"] > 0 and scrape["cpu_ms"] > 0
    assert "asked < 0.5 %" in alone["beside"]


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
    from benchmarks.growth import growth_exponent

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


def test_a_peak_does_not_grow_by_a_free_that_the_profiler_lost():
    from benchmarks.measure import peak_of_changes

    assert peak_of_changes([(1, 100), (2, 50), (1, -100), (3, 70), (2, -50), (3, -70)]) == 150
    assert peak_of_changes([(1, 100), (2, 50), (1, 30), (3, 70), (2, -50), (3, -70)]) == 150  # (1, -100) is missing
    assert peak_of_changes([(9, -40), (1, 30)]) == 0  # one that was there before is freed


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


def test_direct_forms_and_fast_paths_agree():
    """What a benchmark compares must be the same function: every check passes, and would not with another threshold."""
    from benchmarks.case import Case
    from benchmarks.exact import checks

    found = checks(Case(batch=2, frames=3, patches=30, slots=5, width=12, dim=8, hidden=24))
    assert {one.name.split(",")[0] for one in found} == {"decoder", "SSync", "SRL decoder", "SRL encoder"}
    assert [one for one in found if not one.passed] == []
    assert any(0 < one.error < one.allowed for one in found)


def test_merging_of_the_direct_form_is_ours():
    import torch

    from benchmarks import plain_ssync, ssync
    from benchmarks.case import Case

    draw, case = torch.Generator().manual_seed(0), Case(batch=2, frames=3, patches=24, slots=5)
    config = case.run().objective.ssync
    attn, objects = (torch.randn(2, 3, 5, 24, generator=draw, dtype=torch.float64) for _ in range(2))
    attn[:, :, 3] = attn[:, :, 1] + 0.01 * attn[:, :, 3]  # two slots that cover the same patches
    loss = plain_ssync.loss(attn, objects, case.grid, config.merge.threshold)
    assert float(ssync.fast(attn, objects, case.grid, config)) == pytest.approx(float(loss), rel=1e-12)
    assert float(plain_ssync.loss(attn, objects, case.grid, 1.1)) != pytest.approx(float(loss), rel=1e-6)  # nothing merged


def test_released_form_of_the_decoder_is_ours():
    import torch

    from benchmarks import official_form
    from trainer.model.decoder import MLPDecoder

    torch.manual_seed(0)
    decoder = MLPDecoder(8, 5, [12, 16], (3, 4)).double()
    slots = torch.randn(2, 3, 8, dtype=torch.float64)
    for ours, released in zip(decoder(slots), official_form.decode(decoder, slots), strict=True):
        torch.testing.assert_close(ours, released, rtol=1e-12, atol=1e-14)
    before = list(decoder.parameters())
    official_form.adopt(decoder)
    assert all(one is other for one, other in zip(before, decoder.parameters(), strict=True))
    torch.testing.assert_close(decoder(slots)[0], official_form.decode(decoder, slots)[0])


def test_a_single_benchmark_prints_one_object():
    shape = {"batch": 2, "frames": 3, "patches": 12, "slots": 4, "width": 10, "hidden": 16, "steps": 2}
    words = [*(f"--{name}={value}" for name, value in shape.items()), "--path", "fused", "plain", "--json"]
    command = [sys.executable, "-m", "benchmarks.decoder", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["shape"] == "B=2 T=3 P=12 S=4 E=10"
    assert [one["path"] for one in found["cases"]] == ["fused", "plain"]
    assert all(one["cpu_s"] > 0 and one["tensors_mib"] > 0 and one["resident_mib"] >= 0 for one in found["cases"])


def test_grid_of_a_case_is_the_most_square():
    from benchmarks.case import Case

    assert [Case(patches=patches).grid for patches in (256, 24, 7, 1369)] == [(16, 16), (4, 6), (1, 7), (37, 37)]
    case = Case(batch=3, patches=12, settings=("optim.lr=0.5",))
    assert Case.from_json(case.to_json()) == case
    assert case.run().optim.lr == 0.5 and case.run().optim.global_batch == 3


def test_results_are_named_by_date_and_cpu(tmp_path):
    from benchmarks import results_files
    from benchmarks.table import Row

    about = {"cpu": "Acme (R) 9000", "cores": 2, "load": 0.1, "device": "cpu", "threads": 1}
    about |= {"torch": "2", "deepspeed": "0", "python": "3"}
    rows = [Row(section="a", name="b", cpu_ms=1.5), Row(section="c", name="d", peak_mib=2.0, beside="e")]
    path = results_files.write(tmp_path, {"machine": about, "rows": rows, "shape": "s"}, rounds=5)
    assert path.name.endswith("-acme_r_9000.md")
    assert "| b | 1.50 |" in path.read_text() and "## c" in path.read_text()
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept["rows"][1] == {"section": "c", "name": "d", "peak_mib": 2.0, "beside": "e"}


def test_gpu_script_runs_dry(tmp_path):
    """All that a GPU run does, on tiny shapes: checks, rows, memory curve, trace, both reports."""
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert report["dry_run"] and all(one["passed"] for one in report["checks"])
    assert len(report["rows"]) == 12 and not [row for row in report["rows"] + report["memory_curve"] if "error" in row]
    assert report["trace"] and (tmp_path / "out" / "trace.json.gz").stat().st_size > 1000
    assert "the figures mean nothing" in (tmp_path / "out" / "gpu.md").read_text()


def test_gpu_script_refuses_a_wrong_word():
    for words in ([], ["--fast", "out"], ["a", "b", "c"]):
        result = subprocess.run(["bash", "benchmarks/gpu.sh", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and "usage: benchmarks/gpu.sh" in result.stderr


def test_what_is_quoted_of_published_code_says_how_it_is_carried_over():
    from benchmarks import published, targets

    ours = [{"path": "fast", "cpu_s": 0.005, "resident_mib": 6.0}]
    (row,) = targets._published("SSync", published.SSYNC_16K, ours, published.calibration(16, 256, 14.0))
    assert row.cpu_ms == pytest.approx(2 * 606) and "242.40x" in row.beside and "96.0x" in row.beside
    assert row.name == published.LABEL and "times 2.00" in row.beside
    (bare,) = targets._published("SSync", published.SSYNC_16K, ours, targets.Calibration().of(targets.MOVI))
    assert "not calibrated" in bare.beside and bare.cpu_ms == pytest.approx(606)
