"""A journal as JSON lines, and the trainer's events as entries."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings

from recovery.accounting import (
    CheckpointSaved,
    Decided,
    Entry,
    FaultDetected,
    Resumed,
    RunStarted,
    Step,
    Submitted,
    from_json,
    from_trainer,
    read,
    to_json,
)
from tests.recovery.accounting.histories import journals

STEP = {
    "v": 1,
    "t": 1700000000.123,
    "run": "r1",
    "attempt": 0,
    "rank": 0,
    "event": "step",
    "step": 12,
    "loss": 5.4321,
    "tokens": 4096,
    "seconds": 0.21,
    "loss_tokens": None,
    "skipped": False,
    "checkpoint_stall_seconds": None,
}


@settings(max_examples=60, deadline=None)
@given(journals())
def test_what_is_written_is_read_back_equal(entries: list[Entry]) -> None:
    lines = [json.dumps(to_json(one), allow_nan=False) + "\n" for one in entries]
    journal = read(lines)
    assert list(journal.entries) == entries
    assert journal.passed_over == 0


@pytest.mark.parametrize("loss", [math.inf, -math.inf, 5.4321, 1e300, None])
def test_a_loss_keeps_its_bits(loss: float | None) -> None:
    step = Step(1.5, 0, 3, loss=loss)
    assert from_json(json.loads(json.dumps(to_json(step), allow_nan=False))) == step


def test_a_loss_that_is_no_number_comes_back_as_one() -> None:
    back = from_json(to_json(Step(1.5, 0, 3, loss=math.nan)))
    assert isinstance(back, Step)
    assert back.loss is not None
    assert math.isnan(back.loss)


def test_lines_that_are_no_entries_are_told_and_passed_over() -> None:
    journal = read(
        [
            b'{"v": 1, "entry": "submitted", "time": 1.0, "added_later": [1]}\n',
            b"\xff\xfe not json\n",
            "\n",
            "[1, 2]\n",
            '{"entry": "submitted"}\n',
            '{"entry": "submitted", "time": "now"}\n',
            '{"entry": "submitted", "time": NaN}\n',
            '{"entry": "submitted", "time": true}\n',
            '{"entry": "step", "time": 1, "attempt": 0, "step": -1}\n',
            '{"entry": "decided", "time": 1, "decision": "stop", "evidence": "text"}\n',
            '{"entry": "fault_detected", "time": 1, "attempt": 0, "blame": "gremlins"}\n',
            '{"entry": "of_a_later_version", "time": 1.0}\n',
            '{"entry": "ended", "time": 2.0}\n',
        ]
    )
    assert [type(one).__name__ for one in journal.entries] == ["Submitted", "Ended"]
    assert journal.passed_over == len(journal.problems) == 10
    assert any("line 11: blame" in one for one in journal.problems)
    assert not journal.torn


def test_problems_are_told_up_to_a_hundred() -> None:
    journal = read(["x\n"] * 5000)
    assert (journal.passed_over, len(journal.problems)) == (5000, 100)


def test_a_line_that_is_still_being_written_is_torn_and_one_that_lacks_only_its_newline_counts() -> None:
    whole = json.dumps(to_json(Submitted(1.0, "job")))
    assert read([whole[: len(whole) // 2]]).torn
    assert read([whole]).entries == (Submitted(1.0, "job"),)


def test_deep_nesting_is_a_problem_and_no_crash() -> None:
    assert read(["[" * 100_000 + "\n"]).passed_over == 1


def test_the_trainers_step_becomes_an_entry_with_both_times() -> None:
    assert from_trainer(STEP, time=1700000009.0) == Step(
        1700000009.0, 0, 12, 0.21, 4096, 0.0, 5.4321, 1700000000.123
    )


def test_other_ranks_and_other_events_need_no_entry() -> None:
    assert from_trainer(STEP | {"rank": 1}, time=1.0) is None
    assert from_trainer(STEP | {"event": "heartbeat"}, time=1.0) is None
    assert from_trainer({}, time=1.0) is None


def test_starts_resumes_and_saves_of_the_trainer_are_entries() -> None:
    head = {"v": 1, "t": 5.0, "run": "r", "attempt": 2, "rank": 0}
    assert from_trainer(head | {"event": "run_started", "steps": 9}, 6.0) == RunStarted(6.0, 2, 5.0, 9)
    resumed = head | {"event": "resumed", "step": 4, "checkpoint": "c", "reason": "roll_back", "seconds": 1.0}
    assert from_trainer(resumed, 6.0) == Resumed(6.0, 2, 4, "roll_back", 1.0, 5.0, "c")
    saved = head | {"event": "checkpoint_saved", "step": 4, "seconds": 2.0, "stall_seconds": 0.5}
    assert from_trainer(saved, 6.0) == CheckpointSaved(6.0, 2, 4, 2.0, 0.5, 5.0)


def test_an_event_that_breaks_its_schema_is_refused_by_field() -> None:
    with pytest.raises(ValueError, match="step: a whole number"):
        from_trainer(STEP | {"step": "twelve"}, time=1.0)


def test_defaults_are_left_out_of_a_line() -> None:
    assert to_json(Decided(1.0, "stop")) == {"v": 1, "entry": "decided", "time": 1.0, "decision": "stop"}
    assert to_json(FaultDetected(1.0, 0, nodes=("n1",)))["nodes"] == ["n1"]
