"""What becomes of a step: a pure function of what the guards found and what was asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ltf.config.schema import Answer, Guard
from ltf.findings import Finding, Severity


class Outcome(IntEnum):
    """Rising severity: of several findings the gravest answer counts."""

    UPDATE = 0
    SKIP = 1
    ROLL_BACK = 2
    STOP = 3


@dataclass(frozen=True)
class Decision:
    outcome: Outcome
    reason: str


OUTCOMES = {
    Answer.LOG: Outcome.UPDATE,
    Answer.SKIP: Outcome.SKIP,
    Answer.ROLL_BACK: Outcome.ROLL_BACK,
    Answer.STOP: Outcome.STOP,
}


@dataclass(frozen=True)
class Past:
    """`non_finite_in_a_row`: steps just before this one that were not finite. `roll_backs`: so far.
    `can_roll_back`: whether there is a good checkpoint to return to. `trusted`: false where a replay gave
    other gradients each time."""

    non_finite_in_a_row: int
    roll_backs: int
    can_roll_back: bool
    trusted: bool = True


def decide(findings: Sequence[Finding], guard: Guard, past: Past) -> Decision:
    """Whether a step's gradients are applied. Non-finite gradients never are."""
    gravest = Decision(Outcome.UPDATE, "nothing found that forbids it")
    if not past.trusted:
        gravest = Decision(Outcome.SKIP, "no two computations of this step agree")
    for finding in findings:
        answer = _answer(finding, guard, past)
        if answer.outcome > gravest.outcome:
            gravest = answer
    return gravest


def _answer(finding: Finding, guard: Guard, past: Past) -> Decision:
    if finding.severity is Severity.INFO:
        return Decision(Outcome.UPDATE, finding.message)
    family = finding.kind.partition(".")[0]
    match family:
        case "finite":
            if past.non_finite_in_a_row + 1 >= guard.finite.give_up_after:
                row = past.non_finite_in_a_row + 1
                why = f"{row} steps in a row were not finite (guard.finite.give_up_after)"
                return Decision(Outcome.STOP, f"{why}; the last: {finding.message}")
            # Applying such gradients would ruin every parameter, whatever the configuration says.
            outcome = max(OUTCOMES[guard.finite.answer], Outcome.SKIP)
        case "spike":
            outcome = OUTCOMES[guard.spikes.answer]
        case "collapse":
            outcome = OUTCOMES[guard.collapse.answer]
        case "corruption":
            # A transient fault was repaired by the replay; what is undetermined proves nothing.
            proven = finding.kind == "corruption.persistent"
            outcome = OUTCOMES[guard.corruption.answer] if proven else Outcome.UPDATE
        case _:
            outcome = Outcome.UPDATE
    if outcome is not Outcome.ROLL_BACK:
        return Decision(outcome, finding.message)
    if past.roll_backs >= guard.spikes.give_up_after:
        why = f"{past.roll_backs} roll-backs did not help (guard.spikes.give_up_after)"
        return Decision(Outcome.STOP, f"{why}; the last: {finding.message}")
    if not past.can_roll_back:
        return Decision(
            Outcome.SKIP, f"no good checkpoint to return to, so the batch is skipped: {finding.message}"
        )
    return Decision(Outcome.ROLL_BACK, finding.message)
