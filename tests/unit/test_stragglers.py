"""The median of the others, for many ranks at once: the same as by its definition."""

from __future__ import annotations

from statistics import median

from hypothesis import given
from hypothesis import strategies as st

from cluster.supervision.stragglers import median_of_others

SECONDS = st.floats(0, 1e6) | st.sampled_from([0.0, 0.5, 1.0])  # some of them equal


@given(st.lists(SECONDS, min_size=2, max_size=12))
def test_the_median_of_the_others_is_the_plain_one(values: list[float]) -> None:
    ordered = sorted(values)
    plain = [median(values[:place] + values[place + 1 :]) for place in range(len(values))]
    assert [median_of_others(ordered, value) for value in values] == plain
