"""Failures to come, the save interval, and the account in lines of text."""

from __future__ import annotations

import math

import pytest

from recovery.accounting import (
    AttemptStarted,
    CheckpointSaved,
    Decided,
    Ended,
    Entry,
    FaultDetected,
    Resumed,
    Step,
    Submitted,
    account,
    reliability,
    summary,
)
from recovery.accounting.reliability import daly, loss, optimal, young
from recovery.accounting.summary import duration, percent


def failing(times: int) -> list[Entry]:
    """`times` attempts of 1,000 s, each of 100 steps with a save every tenth, each with a restart of 50 s."""
    entries: list[Entry] = [Submitted(0)]
    begin = 0.0
    for attempt in range(times + 1):
        entries.append(AttemptStarted(begin, attempt, ("n1", "n2")))
        if attempt:
            entries.append(Resumed(begin, attempt, 100 * attempt))
        for n in range(1, 101):
            stall = 1.0 if n % 10 == 0 else 0.0
            step = 100 * attempt + n
            entries.append(Step(begin + 10 * n, attempt, step, 10.0, 64, stall))
            if stall:
                entries.append(CheckpointSaved(begin + 10 * n, attempt, step))
        begin += 1000
        if attempt < times:
            entries += [FaultDetected(begin, attempt, "rank.killed"), Decided(begin, "restart")]
            begin += 50
    return entries


def test_the_time_between_failures_is_exposure_by_failures() -> None:
    one = reliability(account(failing(4), now=5200))
    assert one.failures == 4
    assert one.uptime == 5000
    assert one.mttf == 1250
    assert one.failures_per_node_day == pytest.approx(4 / (2 * 5000 / 86_400))
    assert one.mttr == 50


def test_the_interval_around_the_time_between_failures_is_that_of_a_poisson_count() -> None:
    # Exact 90 % limits for the mean of a Poisson count of 4: 1.366 and 9.154 (Garwood, 1936).
    one = reliability(account(failing(4), now=5200))
    assert one.mttf_at_least == pytest.approx(5000 / 9.1535, rel=1e-3)
    assert one.mttf_at_most == pytest.approx(5000 / 1.3663, rel=1e-3)


def test_without_a_failure_there_is_a_lower_bound_and_no_advice() -> None:
    one = reliability(account(failing(0), now=1000))
    assert one.mttf is None
    assert one.mttf_at_least == pytest.approx(1000 / 2.9957, rel=1e-3), "the rule of three"
    assert one.mttf_at_most is None
    assert not one.advice
    assert one.missing == ("0 of 3 failures seen: the time between failures is not known well enough",)


def test_three_failures_and_saves_are_enough_for_advice() -> None:
    assert not reliability(account(failing(2), now=3100)).advice
    one = reliability(account(failing(3), now=4150))
    assert not one.missing
    assert one.save_cost == 1
    assert one.save_interval == pytest.approx(99)
    by_formula = {advice.formula: advice for advice in one.advice}
    assert by_formula["Young"].seconds == pytest.approx(math.sqrt(2 * one.uptime / 3))
    assert by_formula["Young"].steps == round(by_formula["Young"].seconds / 9.9)
    assert one.loss_now is not None
    assert by_formula["least loss"].loss <= one.loss_now


@pytest.mark.parametrize("save", [0.001, 1.0, 60.0, 3000.0])
def test_no_interval_loses_less_than_the_best_one(save: float) -> None:
    best = loss(optimal(save, 3600), save, 3600, 120)
    for factor in (0.2, 0.5, 0.9, 1.1, 2, 5):
        assert best <= loss(optimal(save, 3600) * factor, save, 3600, 120)


def test_dalys_interval_is_close_to_the_best_one_and_youngs_close_when_saves_are_cheap() -> None:
    assert daly(10, 3600) == pytest.approx(optimal(10, 3600), rel=0.005)
    assert daly(300, 3600) == pytest.approx(optimal(300, 3600), rel=0.02)
    assert young(0.01, 3600) == pytest.approx(optimal(0.01, 3600), rel=0.01)
    assert daly(8000, 3600) == 3600


def test_the_summary_says_what_matters_first() -> None:
    told = summary(account([*failing(3), Ended(4150)], now=5000), width=20)
    assert told.head[0] == "finished: step 400, 4 attempts, 3 faults, 1 h 9 min"
    assert told.head[1].startswith("ETTR 95.4 %, last hour ")
    productive = told.buckets[0]
    assert productive.name == "productive"
    assert productive.share == pytest.approx((4000 - 40) / 4150)
    assert productive.bar == "█" * 19 + "▏"
    assert [row.name for row in told.lost] == ["rank.killed", "(checkpoint saves)"]
    assert sum(row.seconds for row in told.buckets) == 4150
    assert any(line.startswith("  rank.killed") for line in told.lines)


def test_a_trainer_that_tells_no_steps_is_said_to() -> None:
    told = summary(account([Submitted(0), AttemptStarted(0, 0)], now=60))
    assert any("no step was told" in line for line in told.head)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0421, "0.042 s"),
        (12.04, "12.0 s"),
        (59.96, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (86_399, "23 h 59 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_less_than_all_is_never_a_hundred_percent() -> None:
    assert (percent(0.99999), percent(1.0), percent(None)) == ("99.9 %", "100.0 %", "-")
