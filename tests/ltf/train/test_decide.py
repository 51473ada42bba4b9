"""What becomes of a step, by findings, configured answers and the run's past."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltf.config.schema import Answer, CollapseGuard, CorruptionGuard, FiniteGuard, Guard, SpikeGuard
from ltf.findings import Finding, Severity
from ltf.train.decide import Outcome, Past, decide

CALM = Past(non_finite_in_a_row=0, roll_backs=0, can_roll_back=True)


def finding(kind: str, *ranks: int) -> Finding:
    return Finding(kind, Severity.ERROR, 7, f"{kind} at step 7", ranks)


def test_without_findings_the_gradients_are_applied() -> None:
    assert decide([], Guard(), CALM).outcome is Outcome.UPDATE


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Answer.LOG, Outcome.UPDATE),
        (Answer.SKIP, Outcome.SKIP),
        (Answer.ROLL_BACK, Outcome.ROLL_BACK),
        (Answer.STOP, Outcome.STOP),
    ],
)
def test_a_spike_is_answered_as_configured(answer: Answer, outcome: Outcome) -> None:
    decision = decide([finding("spike.loss")], Guard(spikes=SpikeGuard(answer=answer)), CALM)
    assert decision.outcome is outcome


def test_gradients_that_are_not_numbers_are_never_applied_even_if_only_logging_was_asked_for() -> None:
    decision = decide([finding("finite.gradient", 1)], Guard(finite=FiniteGuard(answer=Answer.LOG)), CALM)
    assert decision.outcome is Outcome.SKIP
    assert "finite.gradient at step 7" in decision.reason


def test_the_run_stops_when_too_many_steps_in_a_row_are_not_finite() -> None:
    guard = Guard(finite=FiniteGuard(give_up_after=3))
    once = decide([finding("finite.loss")], guard, replace(CALM, non_finite_in_a_row=1))
    thrice = decide([finding("finite.loss")], guard, replace(CALM, non_finite_in_a_row=2))
    assert (once.outcome, thrice.outcome) == (Outcome.SKIP, Outcome.STOP)
    assert "3 steps in a row" in thrice.reason


def test_the_gravest_of_several_findings_counts() -> None:
    guard = Guard(spikes=SpikeGuard(answer=Answer.LOG), collapse=CollapseGuard(answer=Answer.STOP))
    decision = decide([finding("spike.loss"), finding("collapse.valley")], guard, CALM)
    assert decision.outcome is Outcome.STOP
    assert "collapse.valley" in decision.reason


def test_without_a_good_checkpoint_a_roll_back_becomes_a_skip_that_says_so() -> None:
    guard = Guard(spikes=SpikeGuard(answer=Answer.ROLL_BACK))
    decision = decide([finding("spike.loss")], guard, replace(CALM, can_roll_back=False))
    assert decision.outcome is Outcome.SKIP
    assert "no good checkpoint" in decision.reason


def test_roll_backs_that_do_not_help_end_the_run() -> None:
    guard = Guard(spikes=SpikeGuard(answer=Answer.ROLL_BACK, give_up_after=2))
    decision = decide([finding("spike.loss")], guard, replace(CALM, roll_backs=2))
    assert decision.outcome is Outcome.STOP
    assert "2 roll-backs" in decision.reason


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("corruption.persistent", Outcome.STOP),
        ("corruption.transient", Outcome.UPDATE),
        ("corruption.undetermined", Outcome.UPDATE),
    ],
)
def test_corruption_stops_the_run_only_when_it_would_come_again(kind: str, outcome: Outcome) -> None:
    guard = Guard(corruption=CorruptionGuard(answer=Answer.STOP))
    assert decide([finding(kind, 3)], guard, CALM).outcome is outcome


def test_gradients_that_no_two_computations_agree_on_are_not_applied() -> None:
    decision = decide([], Guard(), replace(CALM, trusted=False))
    assert decision.outcome is Outcome.SKIP


def test_information_alone_changes_nothing() -> None:
    guard = Guard(spikes=SpikeGuard(answer=Answer.ROLL_BACK))
    level = Finding("spike.level", Severity.INFO, 7, "a new level")
    assert decide([level], guard, CALM).outcome is Outcome.UPDATE


def test_a_slow_rank_never_changes_what_happens_to_a_step() -> None:
    assert decide([finding("slow_rank", 1)], Guard(), CALM).outcome is Outcome.UPDATE
