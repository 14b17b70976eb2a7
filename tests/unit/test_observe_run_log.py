"""The run log survives kills, resumes without doubles and stays valid JSON whatever the numbers are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from trainer.observe.run_log import RunLog, latest, read_log, series


def refuse_constants(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_lines_hold_step_time_and_values_as_strict_json(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with RunLog(path) as log:
        log.write(3, {"loss/total": np.float32(0.5), "ids": np.array([4, 2])}, note="x")
        log.write(4, {"loss/total": math.nan, "loss/a": math.inf, "loss/b": -math.inf, "nested": [1.0, math.nan]})
    first, second = [json.loads(line, parse_constant=refuse_constants) for line in path.read_text().splitlines()]
    assert first["step"] == 3 and first["loss/total"] == 0.5 and first["ids"] == [4, 2] and first["note"] == "x"
    assert second["loss/total"] == "nan" and second["loss/a"] == "inf" and second["loss/b"] == "-inf"
    assert second["nested"] == [1.0, "nan"] and second["time"] >= first["time"] > 1.6e9


def test_reading_gives_floats_back(tmp_path):
    with RunLog(tmp_path / "log") as log:
        log.write(1, {"a": math.nan, "b": -math.inf})
    (line,) = read_log(tmp_path / "log")
    assert math.isnan(line["a"]) and line["b"] == -math.inf


def test_each_line_is_on_disk_before_the_next(tmp_path):
    log = RunLog(tmp_path / "log")
    log.write(1, {"a": 1.0})
    assert len(read_log(tmp_path / "log")) == 1
    log.close()


def test_a_reserved_key_is_refused(tmp_path):
    with RunLog(tmp_path / "log") as log, pytest.raises(ValueError, match="time"):
        log.write(1, {"time": 4.0})


@given(cut=st.integers(min_value=0, max_value=400), steps=st.integers(min_value=1, max_value=6))
def test_a_log_cut_anywhere_is_repaired(tmp_path_factory, cut, steps):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with RunLog(path) as log:
        for step in range(1, steps + 1):
            log.write(step, {"loss/total": 1.0 / step})
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    complete = whole[: min(cut, len(whole))].count(b"\n")
    assert len(read_log(path)) - complete in (0, 1)  # a cut that took only the line's end leaves it readable
    with RunLog(path) as log:
        log.write(99, {"loss/total": 0.0})
    assert [line["step"] for line in read_log(path)] == [*range(1, complete + 1), 99]
    assert [path.name] == [file.name for file in path.parent.iterdir()]


def test_resume_takes_back_later_lines_of_every_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with RunLog(path) as log:
        for step in (5, 10, 15):
            log.write(step, {"loss/total": float(step)})
            log.write(step, {"metric/video_fg_ari": step / 100})
    before = path.read_bytes()
    log = RunLog(path, resume_step=10)
    assert log.dropped == 2 and before.startswith(path.read_bytes())
    log.write(15, {"loss/total": 0.1})
    log.close()
    assert [line["step"] for line in read_log(path)] == [5, 5, 10, 10, 15]
    assert series(read_log(path), "loss/total") == [(5, 5.0), (10, 10.0), (15, 0.1)]


def test_opening_a_sound_log_does_not_touch_it(tmp_path):
    path = tmp_path / "log"
    with RunLog(path) as log:
        log.write(7, {"a": 1})
    before = path.stat().st_ino, path.read_bytes()
    RunLog(path, resume_step=7).close()
    assert (path.stat().st_ino, path.read_bytes()) == before


def test_damage_in_the_middle_is_named_by_its_line(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_log(path)
    RunLog(path).close()
    assert [line["step"] for line in read_log(path)] == [1, 3]


def test_an_absent_log_is_empty(tmp_path):
    assert read_log(tmp_path / "nothing") == []


def test_the_later_line_of_a_step_counts(tmp_path):
    lines = [{"step": 2, "x": 1.0}, {"step": 1, "x": 3.0}, {"step": 2, "x": 5.0, "y": 1}]
    assert series(lines, "x") == [(1, 3.0), (2, 5.0)]
    assert latest(lines, ("x", "y")) == {"x": 5.0, "y": 1.0}
