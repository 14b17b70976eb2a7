"""Sweeps: which points a command line has, what their folders are called, and what may go on under the same name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cluster.commands.sweep import exit_code, read_plan
from cluster.commands.sweep_points import expand, fix_sweep, read_sweep
from cluster.commands.sweep_table import best_first, read_points, sweep_lines, write_csv
from cluster.flags import LaunchError


def names(*words: str) -> list[str]:
    return [point.name for point in expand(words).points]


def test_every_combination_with_the_last_key_fastest():
    sweep = expand(["experiment=demo", "optim.lr=1e-3,1e-4", "seed=range(3)", "data.views=[a,b]", "note='x,y'", "~old"])
    assert sweep.fixed == ("experiment=demo", "data.views=[a,b]", "note='x,y'", "~old")
    assert [point.overrides for point in sweep.points] == [
        (f"optim.lr={lr}", f"seed={seed}") for lr in ("0.001", "0.0001") for seed in (0, 1, 2)
    ]
    assert sweep.points[4].name == "04_lr0.0001_seed1"


def test_names_are_folder_names_and_tell_equal_last_parts_apart():
    assert names("model.dim=1,2", "head.dim=3") == ["00_dim1", "01_dim2"]
    assert names("model.dim=1,2", "head.dim=3,4")[0] == "00_model.dim1_head.dim3"
    assert names("data.root='/a b/c','/d'") == ["00_root-a-b-c", "01_root-d"]
    assert len(names("x=" + ",".join(f"{'v' * 200}{i}" for i in range(101)))[100]) <= 80
    assert names("x=range(101)")[100] == "100_x100"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "without a list"),
        (["lr=interval(0,1)"], "can be counted"),
        (["model=glob(*)"], "list the names"),
        (["lr=1,"], "Hydra cannot read"),
        (["lr=1,1"], "twice"),
        (["a=range(1000)", "b=range(1000)"], "1,000,000 points"),
        (["store.token=a,b"], "secret"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(words, said):
    with pytest.raises(LaunchError, match=said) as refusal:
        expand(words)
    assert "\n" not in str(refusal.value)


def test_the_same_sweep_goes_on_and_another_is_refused(tmp_path: Path):
    words = ["experiment=demo", "seed=1,2", "data.token=abc"]
    folder = tmp_path / "s"
    first = fix_sweep(folder, expand(words))
    again = fix_sweep(folder, expand(words[::-1]))
    assert again.points == first.points
    assert "data.token=abc" in again.fixed and "abc" not in (folder / "sweep.json").read_text()
    for change in (["experiment=demo", "seed=1,3", "data.token=abc"], ["experiment=other", "seed=1,2", "data.token=abc"]):
        with pytest.raises(LaunchError, match="another sweep"):
            fix_sweep(folder, expand(change))
    assert read_sweep(folder).points == first.points


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "slotstream-sweep/1"}', '{"format": "slotstream-sweep/1", "points": 3}']
)
def test_a_damaged_sweep_file_is_refused_and_kept(tmp_path: Path, content: str):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(LaunchError, match="cannot be read"):
        fix_sweep(tmp_path, expand(["seed=1,2"]))
    assert (tmp_path / "sweep.json").read_text() == content
    assert sweep_lines(tmp_path, read_points(tmp_path), 80)


def test_a_run_is_no_place_for_a_sweep(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(LaunchError, match="folder of a run"):
        fix_sweep(tmp_path, expand(["seed=1,2"]))
    assert not (tmp_path / "sweep.json").exists()


def test_the_command_of_a_point(tmp_path: Path):
    words = [
        "--multirun",
        "--nodes",
        "2",
        "build-shards",
        "--parallel=3",
        "--runs",
        str(tmp_path),
        "name=s",
        "seed=1,2",
        "--keep-failed",
    ]
    plan = read_plan(words)
    assert plan.folder == tmp_path / "s" and plan.parallel == 3 and plan.keep_failed
    assert plan.words(plan.sweep.points[1]) == [
        "--nodes", "2", "--runs", str(tmp_path / "s"), "build-shards", "seed=2", "name=01_seed2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1,2"], "name="),
        (["name=a,b", "seed=1,2"], "name="),
        (["name=s", "seed=1,2", "--parallel", "0"], "--parallel 0"),
        (["name=s", "seed=1,2", "--nodez", "2"], "--nodez"),
        (["evaluate", "name=s", "seed=1,2"], "evaluate"),
        (["name=s", "seed=1,2", "--detach", "--backend", "local"], "--detach"),
        (["name=s/t", "seed=1,2"], "plain folder name"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_made(tmp_path: Path, words, said):
    with pytest.raises(LaunchError, match=said):
        read_plan(["--multirun", "--runs", str(tmp_path / "runs"), *words])
    assert not (tmp_path / "runs").exists()


def make_point(folder: Path, name: str, score: float | None, done: bool = True) -> None:
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text("optim:\n  max_steps: 10\n")
    line = {"step": 10 if done else 4, "time": 1.0, **({} if score is None else {"metric/video_fg_ari": score})}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    if done:
        (run / "DONE").touch()
    else:
        (run / "attempts" / "1").mkdir(parents=True)
        (run / "attempts" / "1" / "launch.json").write_text("{}")
        verdict = {"outcome": "failed", "rank": 3, "node": 1, "rank_exit_code": 1, "last_lines": ["ValueError: no"]}
        (run / "attempts" / "1" / "verdict.json").write_text(json.dumps(verdict))


def test_the_table_is_sorted_best_first_with_all_points_in_it(tmp_path: Path):
    sweep = fix_sweep(tmp_path, expand(["lr=1,2,3,4"]))
    make_point(tmp_path, sweep.points[0].name, 0.25)
    make_point(tmp_path, sweep.points[1].name, None, done=False)
    make_point(tmp_path, sweep.points[2].name, 0.75)
    points = read_points(tmp_path)
    assert [item.point.number for item in best_first(points)] == [2, 0, 1, 3]
    assert [item.state for item in points] == ["done", "failed", "done", "waiting"]
    assert exit_code(points) == 1 and exit_code(points[:1]) == 0 and exit_code([points[0], points[3]]) == 75
    text = "\n".join(sweep_lines(tmp_path, points, None))
    assert "0.7500" in text and "rank 3 (node 1) failed with exit code 1: ValueError: no" in text
    assert all(len(line) <= 40 for line in sweep_lines(tmp_path, points[:1], 40)[1:])
    rows = list(csv.DictReader(write_csv(tmp_path, points).open()))
    assert [row["lr"] for row in rows] == ["3", "1", "2", "4"]
    assert rows[0]["metric/video_fg_ari"] == "0.75" and rows[2]["step"] == "4" and rows[3]["state"] == "waiting"
