"""Histories whose accounts were worked out by hand. Times are seconds after submission."""

from __future__ import annotations

import pytest

from recovery.accounting import (
    Account,
    Accountant,
    AttemptEnded,
    AttemptStarted,
    Blame,
    Bucket,
    CheckpointSaved,
    Decided,
    Diagnosed,
    Ended,
    Entry,
    FaultBegan,
    FaultDetected,
    GotNodes,
    Outcome,
    Resumed,
    RunStarted,
    Step,
    Stopped,
    Submitted,
    SupervisorAttached,
    SupervisorLost,
    Validated,
    Validating,
    WaitingForNodes,
    account,
)
from recovery.accounting.account import NS


def steps(attempt: int, first: int, last: int, begin: float, seconds: float = 1.0) -> list[Entry]:
    """Steps `first` to `last`, one after another from `begin`."""
    return [Step(begin + seconds * (n - first + 1), attempt, n, seconds, 100) for n in range(first, last + 1)]


def buckets(done: Account) -> dict[str, float]:
    return {bucket.value: ns / NS for bucket, ns in done.buckets.items() if ns}


def lost(done: Account) -> dict[str, float]:
    return {one.cause: one.total / NS for one in done.lost}


def test_a_job_without_a_fault_starts_and_is_productive() -> None:
    entries = [
        Submitted(0),
        Validating(1),
        Validated(5),
        WaitingForNodes(5),
        GotNodes(8),
        AttemptStarted(9, 0, ("n1", "n2")),
        RunStarted(15, 0),
        *steps(0, 1, 10, begin=20),
        AttemptEnded(31, 0, Outcome.FINISHED),
        Ended(33, Outcome.FINISHED),
    ]
    done = account(entries, now=100)
    assert buckets(done) == {
        "starting": 1 + 1 + 11,
        "validating": 4,
        "waiting": 3,
        "productive": 11,
        "stopped": 2,
    }
    assert lost(done) == {"(start)": 20}
    assert done.wall == 33 * NS
    assert (done.ettr, done.goodput, done.throughput) == (11 / 33, 1000 / 33, 1000 / 11)
    assert not done.faults
    assert (done.uptime, done.node_uptime) == (22 * NS, 44 * NS)


def killed_rank() -> list[Entry]:
    return [
        Submitted(0),
        AttemptStarted(0, 0),
        *steps(0, 1, 10, begin=10),
        CheckpointSaved(16, 0, 6),
        FaultBegan(20.5, 0),
        FaultDetected(21, 0, "rank.killed"),
        Diagnosed(23, 0, "host.oom", Blame.PLATFORM),
        Decided(24, "restart"),
        AttemptEnded(24.5, 0),
        AttemptStarted(25, 1),
        Resumed(27, 1, 6, seconds=1),
        *steps(1, 7, 12, begin=30),
    ]


def test_steps_beyond_the_checkpoint_are_redone_and_the_fault_answers_for_them() -> None:
    done = account(killed_rank(), now=36)
    assert buckets(done) == {
        "starting": 10,
        "productive": 6 + 6,
        "redone": 4 + 0.5,
        "detecting": 0.5,
        "diagnosing": 3,
        "restarting": 6,
    }
    assert lost(done) == {"host.oom": 14, "(start)": 10}
    (fault,) = done.faults
    assert (fault.began, fault.detected, fault.resumed) == (20.5 * NS, 21 * NS, 30 * NS)
    assert fault.blame is Blame.PLATFORM
    assert (done.steps_done, done.steps_surviving, done.tokens) == (16, 12, 1200)
    assert done.at_risk == 6 * NS


def test_before_the_restart_nobody_knows_yet_what_will_be_redone() -> None:
    entries = killed_rank()
    before = account(entries[:-7], now=26)
    assert before.buckets[Bucket.PRODUCTIVE] == 10 * NS
    assert before.buckets[Bucket.REDONE] == NS // 2
    assert before.phase is Bucket.RESTARTING


def test_the_last_sign_of_life_may_be_told_after_the_detection() -> None:
    without = [one for one in killed_rank() if not isinstance(one, FaultBegan)]
    assert account([*without, FaultBegan(20.5, 0)], now=36) == account(killed_rank(), now=36)
    done = account(without, now=36)
    assert done.buckets[Bucket.DETECTING] == NS, "the last step is the last sign"


def test_a_roll_back_in_the_running_process_is_lost_to_its_finding() -> None:
    entries = [
        Submitted(0),
        *steps(0, 1, 10, begin=0),
        CheckpointSaved(8, 0, 8),
        Resumed(13, 0, 8, "roll_back", seconds=2, cause="loss.spike"),
        *steps(0, 9, 12, begin=13),
    ]
    done = account(entries, now=17)
    assert buckets(done) == {"productive": 8 + 4, "redone": 2 + 1, "restarting": 2}
    assert lost(done) == {"loss.spike": 5}
    assert len(done.attempts) == 1
    assert done.attempts[0].ended is None


def test_two_failures_without_progress_each_pay_for_themselves() -> None:
    entries = [
        Submitted(0),
        AttemptStarted(0, 0),
        *steps(0, 1, 10, begin=10),
        CheckpointSaved(15, 0, 5),
        FaultDetected(22, 0, "first"),
        Decided(23, "restart"),
        AttemptStarted(24, 1),
        RunStarted(26, 1),
        FaultDetected(30, 1, "second"),
        Decided(31, "restart"),
        AttemptStarted(32, 2),
        Resumed(35, 2, 5),
        *steps(2, 6, 6, begin=36),
    ]
    done = account(entries, now=37)
    assert lost(done) == {
        "first": 2 + 1 + 3 + 5,  # detected, decided, restarting until its last sign, steps 6 to 10
        "second": 4 + 1 + 5,
        "(start)": 10,
    }
    assert [fault.resumed for fault in done.faults] == [36 * NS, 36 * NS]
    assert buckets(done)["productive"] == 6


def test_an_older_checkpoint_than_the_newest_is_paid_by_the_restart_that_took_it() -> None:
    entries = [
        *[Submitted(0), AttemptStarted(0, 0), *steps(0, 1, 10, begin=0), CheckpointSaved(10, 0, 10)],
        *[FaultDetected(10, 0, "first"), Decided(10, "restart"), AttemptStarted(10, 1)],
        *[FaultDetected(10, 1, "checkpoint.corrupt"), Decided(10, "roll_back"), AttemptStarted(10, 2)],
        *[Resumed(10, 2, 4), *steps(2, 5, 5, begin=10)],
    ]
    assert lost(account(entries, now=11)) == {"checkpoint.corrupt": 6, "first": 0}


def test_a_failure_before_the_first_step_leaves_no_step_to_lose() -> None:
    entries = [
        Submitted(0),
        AttemptStarted(2, 0),
        FaultBegan(6, 0),
        FaultDetected(7, 0, "code.import_error", Blame.USER),
        Decided(8, "stop"),
        Ended(9, Outcome.FAILED),
    ]
    done = account(entries, now=50)
    assert buckets(done) == {"starting": 6, "detecting": 1, "diagnosing": 1, "stopped": 1}
    assert lost(done) == {"(start)": 6, "code.import_error": 2}
    assert done.ettr == 0
    assert done.attempts[0].first_step is None


def test_a_job_that_its_user_ends_keeps_what_its_checkpoints_hold() -> None:
    entries: list[Entry] = [
        Submitted(0),
        *steps(0, 1, 10, begin=0),
        CheckpointSaved(7, 0, 7),
        Stopped(10, by="ops"),
        AttemptEnded(12, 0, Outcome.STOPPED),
        Ended(13, Outcome.STOPPED),
    ]
    done = account(entries, now=99)
    assert buckets(done) == {"productive": 7, "redone": 3, "stopped": 3}
    assert lost(done) == {"(stop)": 3}
    assert not done.faults
    saved = [*entries[:-2], CheckpointSaved(11, 0, 10), *entries[-2:]]
    assert buckets(account(saved, now=99)) == {"productive": 10, "stopped": 3}


def test_a_job_whose_end_is_the_last_that_its_journal_tells_has_finished_without_a_fault() -> None:
    done = account([Submitted(0), *steps(0, 1, 10, begin=0), Ended(12)], now=99)
    assert buckets(done) == {"productive": 12}
    assert not done.faults


def test_a_job_that_is_submitted_again_was_stopped_in_between() -> None:
    entries = [
        *[Submitted(0), *steps(0, 1, 4, begin=0), CheckpointSaved(3, 0, 3)],
        *[Stopped(4), Ended(5, Outcome.STOPPED), Submitted(105), AttemptStarted(106, 1)],
        *[Resumed(108, 1, 3), *steps(1, 4, 5, begin=109)],
    ]
    done = account(entries, now=111)
    assert buckets(done) == {"productive": 3 + 2, "redone": 1, "stopped": 101, "starting": 4}
    assert lost(done) == {"(stop)": 1, "(start)": 4}


def test_standing_still_for_a_save_is_a_part_of_the_step_and_stays_one_when_it_is_redone() -> None:
    entries = [
        Submitted(0),
        Step(3, 0, 1, 3, 100, checkpoint_stall_seconds=1),
        Step(6, 0, 2, 3, 100, checkpoint_stall_seconds=0.5),
        CheckpointSaved(6, 0, 1),
        Resumed(6, 0, 1, "roll_back"),
    ]
    done = account(entries, now=6)
    assert buckets(done) == {"checkpoint": 1.5, "productive": 2, "redone": 2.5}
    assert lost(done) == {"(checkpoint saves)": 1.5, "roll_back": 2.5}


def test_training_goes_on_without_a_supervisor() -> None:
    entries = [
        *[Submitted(0), AttemptStarted(0, 0), *steps(0, 1, 5, begin=0)],
        *[SupervisorLost(5), SupervisorAttached(20)],
        *[Step(20, 0, n, 1, t=float(n)) for n in range(6, 19)],
    ]
    done = account(entries, now=20)
    assert buckets(done) == {"productive": 20}
    assert done.unsupervised == 15 * NS


def test_steps_of_a_node_that_was_only_cut_off_take_their_time_back_from_the_detection() -> None:
    entries = [
        *[Submitted(0), *steps(0, 1, 5, begin=0), FaultDetected(15, 0, "node.unreachable")],
        *[Step(16, 0, n, 1, t=float(n)) for n in range(6, 13)],
        *[Decided(17, "continue"), *steps(0, 13, 15, begin=17)],
    ]
    done = account(entries, now=20)
    assert buckets(done) == {"productive": 12 + 3, "detecting": 3, "diagnosing": 2}
    assert not done.buckets[Bucket.REDONE]


@pytest.mark.parametrize("decision", ["probe", "wait"])
def test_a_decision_that_is_put_off_is_no_restart_yet(decision: str) -> None:
    entries = [
        *[Submitted(0), *steps(0, 1, 5, begin=0), FaultDetected(5, 0, "hang"), Decided(6, decision)],
        *[Decided(9, "restart"), AttemptStarted(10, 1)],
    ]
    phase = "diagnosing" if decision == "probe" else "waiting"
    found = buckets(account(entries, now=11))
    assert found.pop(phase) == 3 + (phase == "diagnosing")
    assert found.pop("restarting") == 2


def test_a_step_told_twice_counts_once_and_an_old_attempts_step_not_at_all() -> None:
    entries = [*killed_rank(), Step(36, 1, 12, 1, 100), Step(36, 0, 11, 1, 100)]
    done = account(entries, now=36)
    assert done.ignored == 2
    assert done.buckets == account(killed_rank(), now=36).buckets


def test_an_attempt_that_ends_with_nobody_to_say_why_is_an_unknown_fault() -> None:
    entries = [*[Submitted(0), *steps(0, 1, 5, begin=0), AttemptStarted(8, 1)], *steps(1, 1, 1, begin=9)]
    done = account(entries, now=10)
    assert lost(done) == {"unknown": 9}
    assert [one.outcome for one in done.attempts] == [Outcome.FAILED, None]


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    entries = [*[Submitted(100), *steps(0, 1, 5, begin=100)], *[FaultDetected(90, 0), Decided(80, "restart")]]
    done = account(entries, now=50)
    assert buckets(done) == {"productive": 5}
    assert done.wall == 5 * NS


def test_the_last_hour_is_told_apart_from_the_whole_run() -> None:
    entries = [Submitted(0), AttemptStarted(0, 0), *steps(0, 1, 100, begin=7200, seconds=60)]
    done = account(entries, now=13_200)
    assert done.ettr == 6000 / 13_200
    assert done.ettr_last_hour == 1
    assert account(entries[:42], now=7200 + 2400).ettr_last_hour == 2400 / 3600


def test_a_time_that_no_clock_shows_is_refused() -> None:
    for wrong in (float("nan"), float("inf"), -1.0, 1e12):
        with pytest.raises(ValueError, match="a time in seconds"):
            Accountant().add(Submitted(wrong))
