"""Weighted blends: every weight is kept at every moment, and any sample can be asked for alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltf.data.blend import LONGEST_PERIOD, Schedule, whole_parts
from ltf.data.errors import DataError

whole_weights = st.lists(st.integers(1, 60), min_size=1, max_size=25)


@given(weights=whole_weights)
def test_after_any_number_of_samples_each_source_gave_its_share_to_within_one(weights: list[int]) -> None:
    schedule = Schedule(weights)
    n = np.arange(1, 2 * schedule.period + 1)
    sources, _ = schedule(n - 1)
    for source, part in enumerate(schedule.parts):
        given_so_far = np.cumsum(sources == source)
        # In whole numbers: |given - n part / period| < 1.
        assert (np.abs(given_so_far * schedule.period - n * part) < schedule.period).all()


@given(weights=whole_weights, start=st.integers(0, 10**12), count=st.integers(1, 200))
def test_any_stretch_asked_alone_continues_what_came_before(
    weights: list[int], start: int, count: int
) -> None:
    schedule = Schedule(weights)
    sources, nth = schedule(np.arange(start, start + count))
    before = schedule.counts(start)
    for source, index in zip(sources.tolist(), nth.tolist(), strict=True):
        assert index == before[source]
        before[source] += 1
    assert before == schedule.counts(start + count)


def test_decimal_weights_mean_what_they_say() -> None:
    assert whole_parts([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_parts([12.345, 87.655]) == [2469, 17531]
    assert whole_parts([3, 3]) == [1, 1]


@settings(max_examples=50)
@given(weights=st.lists(st.floats(1e-9, 1e12), min_size=2, max_size=30))
def test_weights_that_need_a_longer_period_are_rounded_and_none_is_lost(weights: list[float]) -> None:
    parts = whole_parts(weights)
    assert min(parts) >= 1
    assert sum(parts) <= LONGEST_PERIOD
    for part, weight in zip(parts, weights, strict=True):
        ideal = weight / sum(weights) * sum(parts)
        # One part for each source is set aside before the rest is shared out.
        assert abs(part - ideal) <= len(weights) + 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(DataError, match="of source 1: expected a number above 0"):
        Schedule([1.0, weight])
