"""Curves and colours: nothing outside the picture, gaps stay gaps, and colour-blind readers can tell the lines apart."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from test_report_render import DEUTERANOPE, PROTANOPE, to_lab, to_linear

from trainer.report import colours
from trainer.report.charts import chart
from trainer.report.curves import line_chart, linear_ticks, thin, tick_text


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


def test_a_run_keeps_its_line_where_another_has_nothing_to_show():
    """A colour that meant run b in one chart and run a in the next would mislead."""
    points = [(1, 1.0), (2, 2.0)]
    figure = chart("x", [("a", []), ("b", points)], keep_places=True)
    assert figure.count(colours.stroke(1)) == 2 and "a (none)" in figure  # the line, and its sample in the legend
    assert colours.stroke(0) not in line_chart("x", [("a", []), ("b", points)])


def test_twelve_lines_differ_in_colour_or_dash():
    assert len({colours.stroke(number) for number in range(12)}) == 12


@pytest.mark.parametrize(("palette", "paper"), [(colours.LIGHT, colours.PAPER_LIGHT), (colours.DARK, colours.PAPER_DARK)])
def test_colours_differ_for_colour_blind_eyes_and_stand_out_from_the_page(palette, paper):
    shades = np.array([[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in (*palette, paper)])
    linear = to_linear(shades)
    for eye in (np.eye(3), PROTANOPE, DEUTERANOPE):
        lab = to_lab(np.clip(linear[:-1] @ eye.T, 0, 1))
        assert (np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e9 * np.eye(len(lab))).min() >= 15
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722]) + 0.05
    contrast = np.maximum(luminance[:-1], luminance[-1]) / np.minimum(luminance[:-1], luminance[-1])
    assert contrast.min() >= 3
