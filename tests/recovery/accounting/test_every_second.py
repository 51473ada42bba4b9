"""Every nanosecond is in exactly one bucket, whatever the history."""

from __future__ import annotations

import math
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.accounting import (
    Accountant,
    AttemptStarted,
    Bucket,
    CheckpointSaved,
    Entry,
    Step,
    Submitted,
    account,
    document,
    reliability,
    summary,
)
from recovery.accounting.account import LOST, NS
from tests.recovery.accounting.histories import START, journals, plausible

HISTORIES = st.one_of(journals(), plausible())
NOW = st.floats(START - 10, START + 200_000)


@settings(max_examples=100, deadline=None)
@given(HISTORIES, NOW)
def test_the_buckets_add_up_to_the_wall_clock_exactly(entries: list[Entry], now: float) -> None:
    done = account(entries, now)
    assert sum(done.buckets.values()) == done.wall
    assert done.wall >= 0
    assert min(done.buckets.values()) >= 0
    if done.outcome is None:
        assert done.until >= round(now * NS)


@settings(max_examples=100, deadline=None)
@given(HISTORIES, NOW)
def test_every_lost_nanosecond_has_exactly_one_cause(entries: list[Entry], now: float) -> None:
    done = account(entries, now)
    for bucket in LOST:
        assert sum(one.buckets.get(bucket, 0) for one in done.lost) == done.buckets[bucket]
    unplanned = sum(one.total for one in done.lost if not one.planned)
    assert sum(sum(fault.buckets.values()) for fault in done.faults) == unplanned
    assert sum(one.faults for one in done.lost) == len(done.faults)


@settings(max_examples=100, deadline=None)
@given(HISTORIES, NOW)
def test_the_timeline_has_no_gap_and_no_overlap_and_agrees_with_the_buckets(
    entries: list[Entry], now: float
) -> None:
    accountant = Accountant()
    for entry in entries:
        accountant.add(entry)
    done, spans = accountant.account(now), accountant.timeline(now)
    ends = [done.submitted, *(span.end for span in spans)]
    assert [span.start for span in spans] == ends[:-1]
    assert ends[-1] == done.until
    found = dict.fromkeys(Bucket, 0)
    for span in spans:
        assert span.end > span.start
        assert bool(span.cause) == (span.bucket in LOST)
        found[span.bucket] += span.end - span.start
    assert found == done.buckets
    hour = max(done.submitted, done.until - 3600 * NS)
    productive = [span for span in spans if span.bucket is Bucket.PRODUCTIVE]
    assert done.productive_last_hour == sum(max(0, span.end - max(span.start, hour)) for span in productive)


@settings(max_examples=40, deadline=None)
@given(HISTORIES, st.lists(NOW, max_size=40))
def test_asking_in_between_changes_nothing(entries: list[Entry], asked: list[float]) -> None:
    accountant = Accountant()
    for number, entry in enumerate(entries):
        accountant.add(entry)
        if number < len(asked):
            assert accountant.account(asked[number]) == account(entries[: number + 1], asked[number])
            accountant.timeline(asked[number])
    assert accountant.account(START + 1e5) == account(entries, START + 1e5)


@settings(max_examples=40, deadline=None)
@given(HISTORIES, NOW)
def test_whatever_the_history_it_can_be_told(entries: list[Entry], now: float) -> None:
    done = account(entries, now)
    one = reliability(done)
    assert all(line == line.rstrip() for line in summary(done).lines)
    assert one.mttf is None or math.isfinite(one.mttf)
    assert one.expected_ettr is None or 0 <= one.expected_ettr <= 1
    assert all(0 <= advice.loss <= 1 for advice in one.advice)
    assert document(done)["wall_ns"] == done.wall
    for ratio in (done.ettr, done.ettr_last_hour):
        assert ratio is None or 0 <= ratio <= 1


@settings(max_examples=40, deadline=None)
@given(plausible(), NOW)
def test_steps_that_survive_and_steps_that_are_redone_are_all_steps(entries: list[Entry], now: float) -> None:
    done = account(entries, now)
    assert done.steps_done == sum(isinstance(entry, Step) for entry in entries)
    assert 0 <= done.steps_surviving <= done.steps_done
    assert sum(one.steps for one in done.attempts) == done.steps_done
    if done.tokens is not None:
        assert done.tokens == 64 * done.steps_surviving


def test_a_million_steps_are_accounted_in_seconds() -> None:
    steps: list[Entry] = [Submitted(START), AttemptStarted(START, 0, ("n1",))]
    for number in range(1, 1_000_001):
        steps.append(Step(START + number, 0, number, 1.0, 4096, 0.5 if number % 100 == 0 else 0.0))
    before = time.process_time()
    accountant = Accountant()
    for entry in steps:
        accountant.add(entry)
    assert time.process_time() - before < 12
    before = time.process_time()
    done = accountant.account(START + 1_000_000)
    assert time.process_time() - before < 0.05, "a running job is asked again and again"
    assert done.buckets[Bucket.CHECKPOINT] == 10_000 * NS // 2
    assert done.steps_surviving == 1_000_000
    accountant.add(CheckpointSaved(START + 1_000_000, 0, 1_000_000))
    assert accountant.account(START + 1_000_000).at_risk == 0
