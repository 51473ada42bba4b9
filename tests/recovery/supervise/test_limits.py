"""How long ranks may be silent, on driven clocks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recovery.supervise.limits import Bounds, Limits, Patience, Silence

BEAT = 10.0


class Run:
    """One attempt of two ranks. `now`: the supervisor's monotonic clock; `offset`: the nodes' from it."""

    def __init__(self, patience: Patience | None = None, *, events: bool = True) -> None:
        self.limits = Limits(patience)
        self.now, self.offset, self.attempt = 1000.0, 1_700_000_000.0, 0
        self.progress = 0
        self.limits.begin(0, [0, 1], self.now, events=events)

    def tell(self, event: str, rank: int = 0, **fields: Any) -> None:
        base = {"v": 1, "t": self.now + self.offset, "run": "r", "attempt": self.attempt, "rank": rank}
        self.limits.observe({**base, "event": event, **fields}, self.now)

    def beat(self, phase: str = "step", quiet: float = 0.0, *, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            self.tell(
                "heartbeat",
                rank,
                step=1,
                phase=phase,
                phase_seconds=quiet,
                progress=self.progress,
                quiet_seconds=quiet,
            )

    def train(self, steps: int, seconds: float) -> None:
        for step in range(steps):
            self.now += seconds
            self.progress += 1
            self.tell("step", step=step + 1, loss=1.0, tokens=1, seconds=seconds)
            self.beat()

    def over(self) -> list[tuple[int, Silence]]:
        return [(each.rank, each.silence) for each in self.limits.overdue(self.now)]

    def stand_still(self, seconds: float, phase: str = "step") -> None:
        """Hearts beat, training does not get on."""
        for beat in range(1, int(seconds / BEAT) + 1):
            self.now += BEAT
            self.beat(phase, quiet=beat * BEAT)


def test_a_slow_start_does_not_trip() -> None:
    run = Run()
    run.beat("start")
    run.stand_still(3000, "start")
    assert run.over() == []
    run.stand_still(3700, "start")
    assert run.over() == [(0, Silence.START), (1, Silence.START)]


def test_a_first_step_that_compiles_has_the_patience_of_a_start() -> None:
    run = Run()
    run.beat("start")
    run.stand_still(2000, "step")
    assert run.over() == [], "the limit of a step is 1,800 s before one was seen"


def test_a_rank_that_never_says_anything_is_overdue_after_the_starts_limit() -> None:
    run = Run()
    run.now += 3590
    run.beat("start", ranks=(0,))
    assert run.over() == []
    run.now += 20
    assert run.over() == [(1, Silence.START)]


def test_a_step_three_times_as_long_as_any_before_does_not_trip_and_one_over_the_multiple_does() -> None:
    run = Run()
    run.train(5, 20.0)
    run.stand_still(60)
    assert run.over() == []
    run.stand_still(100)
    assert run.over() == [], "5 x 20 s is the limit, not over it"
    run.stand_still(110)
    assert run.over() == [(0, Silence.STEP), (1, Silence.STEP)]
    first = run.limits.overdue(run.now)[0]
    assert (first.seconds, first.limit, first.largest) == (110.0, 100.0, 20.0)
    assert str(first) == ("rank 0 does not get on (step) for 110.0 s (limit 100.0 s, largest seen 20.0 s)")


def test_quick_steps_do_not_make_the_limit_shorter_than_its_floor() -> None:
    run = Run()
    run.train(5, 0.1)
    run.stand_still(30)
    assert run.over() == []
    run.stand_still(40)
    assert run.over() != []


def test_the_slow_first_step_does_not_stretch_the_limit_of_the_later_ones() -> None:
    run = Run()
    run.train(1, 600.0)
    run.train(5, 1.0)
    assert run.limits.limit(Silence.STEP) == 30.0
    assert run.limits.limit(Silence.START) == 3000.0


def test_each_phase_has_a_limit_of_its_own() -> None:
    run = Run()
    run.train(5, 1.0)
    run.stand_still(300, "checkpoint")
    run.stand_still(300, "evaluation")
    run.stand_still(300, "replay")
    assert run.over() == []
    run.tell("checkpoint_saved", step=5, path="p", bytes=1, seconds=90.0, stall_seconds=4.0)
    run.tell("evaluation", step=5, loss=1.0, tokens=1, seconds=50.0)
    assert run.limits.limit(Silence.CHECKPOINT) == 60.0, "20 s, but the floor is a minute"
    assert run.limits.limit(Silence.EVALUATION) == 250.0
    assert run.limits.limit(Silence.REPLAY) == 3600.0
    run.stand_still(70, "checkpoint")
    assert run.over() == [(0, Silence.CHECKPOINT), (1, Silence.CHECKPOINT)]


def test_a_silence_that_ended_teaches_and_one_that_lasts_does_not() -> None:
    run = Run()
    run.train(5, 1.0)
    run.stand_still(25)
    assert run.limits.limit(Silence.STEP) == 30.0
    run.progress += 1
    run.beat()
    assert run.limits.limit(Silence.STEP) == 100.0, "20 s were told before it got on"


def test_a_heart_that_stops_is_told_from_a_thread_that_waits() -> None:
    run = Run()
    run.train(5, 1.0)
    for _ in range(4):
        run.now += BEAT
        run.beat(ranks=(0,))
    assert run.over() == []
    for _ in range(4):
        run.now += BEAT
        run.beat(ranks=(0,))
    assert run.over() == [(1, Silence.HEART)]


def test_a_rank_that_ended_may_be_silent() -> None:
    run = Run()
    run.train(5, 1.0)
    run.tell("exited", rank=1, step=5, status=0, reason="finished", message="")
    run.limits.ended(0)
    run.now += 10_000
    assert run.over() == []


def test_limits_survive_a_restart_of_the_supervisor() -> None:
    run = Run()
    run.train(5, 20.0)
    after = Run()
    after.limits.restore(json.loads(json.dumps(run.limits.state())))
    assert [after.limits.limit(each) for each in Silence] == [run.limits.limit(each) for each in Silence]
    assert after.limits.limit(Silence.STEP) == 100.0


def test_a_new_attempt_keeps_what_was_learned_and_forgets_who_was_silent() -> None:
    run = Run()
    run.train(5, 20.0)
    run.stand_still(200)
    assert run.over()
    run.limits.begin(1, [0, 1], run.now)
    assert run.over() == []
    assert run.limits.limit(Silence.STEP) == 100.0
    run.train(1, 500.0)
    assert run.limits.limit(Silence.STEP) == 100.0, "that was still written by attempt 0"


@pytest.mark.parametrize("jump", [7200.0, -7200.0])
def test_a_nodes_clock_that_is_set_neither_trips_nor_teaches(jump: float) -> None:
    run = Run()
    run.train(20, BEAT)
    before = run.limits.state()
    run.offset += jump
    run.train(1, BEAT)
    assert run.over() == []
    assert run.limits.state() == before


def test_a_supervisor_that_stood_still_learns_nothing_from_what_it_then_reads_at_once() -> None:
    run = Run()
    run.train(5, BEAT)
    assert run.limits.limit(Silence.HEART) == 50.0
    run.now += 500.0
    run.offset -= 490.0
    run.progress += 1
    run.beat()
    assert run.limits.limit(Silence.HEART) == 50.0


def test_a_trainer_without_events_is_watched_by_its_output() -> None:
    run = Run(events=False)
    run.now += 3000
    assert run.over() == []
    run.limits.printed(0, run.now)
    assert run.limits.limit(Silence.OUTPUT) == 15_000.0
    run.now += 700
    assert run.over() == []


def test_a_trainer_that_prints_often_is_missed_sooner() -> None:
    run = Run(events=False)
    for _ in range(10):
        run.now += 20
        run.limits.printed(0, run.now)
        run.limits.printed(1, run.now)
    run.now += 601
    assert run.over() == [(0, Silence.OUTPUT), (1, Silence.OUTPUT)]
    run.beat()
    assert run.over() == [], "its first event makes it one that speaks"


@pytest.mark.parametrize(
    "wrong",
    [
        {"quiet_seconds": "nan"},
        {"quiet_seconds": -1},
        {"quiet_seconds": True},
        {"phase": "lunch"},
        {"phase": "heart"},
        {"progress": None},
        {"rank": "1"},
        {"rank": 7},
        {"attempt": 3},
    ],
)
def test_an_event_that_makes_no_sense_changes_nothing(wrong: dict[str, Any]) -> None:
    run = Run()
    run.train(5, 1.0)
    before = run.limits.state()
    fields = {"phase": "step", "progress": 99, "quiet_seconds": 1e9, "phase_seconds": 1, **wrong}
    event = {"t": run.now, "attempt": 0, "rank": 0, "event": "heartbeat", **fields}
    run.limits.observe(event, run.now)
    assert run.limits.state() == before
    assert run.over() == []


@pytest.mark.parametrize(
    "wrong", [{"multiple": 1.0}, {"step": Bounds(0.0, 1.0)}, {"heart": Bounds(9.0, 1.0)}]
)
def test_patience_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Patience(**wrong)
