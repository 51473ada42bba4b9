"""How a journal is read: entry by entry, each in its effect on the job's history."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from recovery.accounting.account import NS, Account, Bucket, Span
from recovery.accounting.entries import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    Decided,
    Diagnosed,
    Diagnosing,
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
)
from recovery.accounting.history import START, Attempt, Gap, History
from recovery.accounting.journal import LATEST
from recovery.accounting.totals import Totals, total
from recovery.blame import Blame


def account(entries: Iterable[Entry], now: float) -> Account:
    """The account of a job from its whole journal. `now`: seconds since 1970; see :class:`Accountant`."""
    accountant = Accountant()
    for entry in entries:
        accountant.add(entry)
    return accountant.account(now)


class Accountant:
    """A job's account, kept entry by entry: ``add`` each, ask for ``account(now)`` whenever it is wanted.

    The order of the entries is what happened; their times only say when. Equal times make pieces of no
    duration. A time that lies behind what is accounted already (a clock was set back, or a trainer's clock
    is late) counts as the end of what is accounted: nothing is counted twice and nothing is taken away. A
    trainer's own time `t` is used where it is earlier than the supervisor's. The job's wall-clock therefore
    runs from its first entry to its ``Ended`` entry, or to `now`, or to the newest entry where `now` is
    behind it.

    Nothing that a journal may lack or say twice is an error. A step whose attempt was never started starts
    it; an attempt that starts while another trains ends that one with an unknown fault; steps told twice
    and events of earlier attempts are passed over, and counted in `ignored`. Steps that arrive after their
    attempt's fault was detected, as from a supervisor that catches up or a node that was only cut off, take
    their time back from the detection; training that goes on while a fault is being diagnosed counts as
    steps."""

    def __init__(self) -> None:
        self._history: History | None = None
        self._attempts: list[Attempt] = []
        self._open: int | None = None
        """The fault that is not repaired yet."""
        self._condemned = False
        """The attempt has a fault or is over: its steps, if any still come, do not mean that all is well."""
        self._gap: Gap | None = None
        """What lies around the last fault's last sign of life, which may still be told better."""
        self._sign: int | None = None
        self._told_sign: tuple[int, int] | None = None
        self._latest_step = -1
        self._resumes: set[tuple[int, float | None]] = set()
        self._outcome: Outcome | None = None
        self._away: int | None = None
        self._totals = Totals()
        self._handlers: dict[type, Callable[[History, Any], None]] = {
            Submitted: self._submitted,
            Validating: lambda h, e: self._hold(h, Bucket.VALIDATING, e.time),
            Validated: lambda h, e: self._release(h, e.time),
            WaitingForNodes: lambda h, e: self._hold(h, Bucket.WAITING, e.time),
            GotNodes: lambda h, e: self._release(h, e.time),
            AttemptStarted: lambda h, e: self._start(h, e.attempt, _ns(e.time), e.nodes),
            RunStarted: self._run_started,
            Resumed: self._resumed,
            Step: self._step,
            CheckpointSaved: self._checkpoint_saved,
            FaultBegan: self._fault_began,
            FaultDetected: self._fault_detected,
            Diagnosing: self._diagnosing,
            Diagnosed: self._diagnosed,
            Decided: self._decided,
            AttemptEnded: self._attempt_ended,
            Stopped: lambda h, e: self._stop(h, _ns(e.time), "(stop)"),
            Ended: self._ended,
            SupervisorLost: self._supervisor_lost,
            SupervisorAttached: self._supervisor_attached,
        }

    def add(self, entry: Entry) -> None:
        """Account for the next entry. Raises ValueError for a time outside the years 1970 to 2255."""
        history = self._history
        if history is None:
            history = self._history = History(_ns(entry.time))
        if self._outcome is not None and not isinstance(entry, _AFTER_THE_END):
            self._totals.ignored += 1
            return
        self._handlers[type(entry)](history, entry)

    def account(self, now: float) -> Account:
        """The account at `now`, seconds since 1970. The history goes on: more entries may follow."""
        history = self._history or History(_ns(now))
        return total(
            history, self._until(history, now), self._attempts, self._outcome, self._away, self._totals
        )

    def timeline(self, now: float) -> tuple[Span, ...]:
        """The same time in stretches without a gap, from submission to end."""
        history = self._history or History(_ns(now))
        return history.spans(self._until(history, now), self._totals.surviving(history, self._outcome))

    def _until(self, history: History, now: float) -> int:
        return history.frontier if self._outcome is not None else max(_ns(now), history.frontier)

    # What the supervisor does

    def _submitted(self, history: History, entry: Submitted) -> None:
        if history.phase is Bucket.STOPPED:
            self._again(history, _ns(entry.time))

    def _hold(self, history: History, phase: Bucket, time: float) -> None:
        if history.phase not in (Bucket.PRODUCTIVE, Bucket.STOPPED):
            history.enter(phase, _ns(time))

    def _release(self, history: History, time: float) -> None:
        if history.phase in (Bucket.VALIDATING, Bucket.WAITING):
            history.enter(_down(history), _ns(time))

    def _start(self, history: History, attempt: int, at: int, nodes: tuple[str, ...] = ()) -> None:
        if history.phase is Bucket.PRODUCTIVE:
            # Something ended the running attempt, and the journal does not say what.
            self._break(history, self._fault_now(history, at, "unknown", named=False), at)
        if history.phase is Bucket.STOPPED:
            self._again(history, at)
        elif self._open is not None:
            history.enter(Bucket.RESTARTING, at, self._open)
        else:
            history.enter(_down(history), at)
        self._end_attempt(history.frontier, None)
        self._attempts.append(Attempt(attempt, nodes, history.frontier))
        history.attempt = attempt
        self._condemned = False
        self._sign = history.frontier
        self._latest_step = -1
        self._resumes.clear()

    def _again(self, history: History, at: int) -> None:
        """The job was stopped or over and is wanted again."""
        history.enter(Bucket.STARTING, at, START)
        history.fault("(started again)", planned=True)
        self._outcome = None
        self._open = None

    def _diagnosing(self, history: History, entry: Diagnosing) -> None:
        if self._open is not None and history.phase not in (Bucket.PRODUCTIVE, Bucket.STOPPED):
            history.enter(Bucket.DIAGNOSING, _ns(entry.time), self._open)

    def _diagnosed(self, history: History, entry: Diagnosed) -> None:
        for fault in reversed(history.faults):
            if fault.attempt == entry.attempt and not fault.planned:
                fault.cause, fault.blame, fault.named = entry.cause, entry.blame, True
                return
        self._totals.ignored += 1

    def _decided(self, history: History, entry: Decided) -> None:
        at = _ns(entry.time)
        if entry.decision == "stop":
            self._stop(history, at, "(stop)")
        elif history.phase is Bucket.STOPPED:
            self._totals.ignored += 1
        elif entry.decision == "continue":
            if self._open is not None:
                self._repaired(history, history.enter(Bucket.PRODUCTIVE, at))
                if self._attempts:
                    self._attempts[-1].fault = None
                self._condemned = False
        elif self._open is not None:
            history.enter(_AFTER_DECISION.get(entry.decision, Bucket.RESTARTING), at, self._open)
        elif history.phase is Bucket.PRODUCTIVE and entry.decision not in _AFTER_DECISION:
            at = history.commit(at)
            self._open = history.fault(f"(decided: {entry.decision})", planned=True)
            history.enter(Bucket.RESTARTING, at, self._open)
            self._condemned = True

    def _attempt_ended(self, history: History, entry: AttemptEnded) -> None:
        if entry.attempt != history.attempt or not self._attempts:
            self._totals.ignored += 1
            return
        at = _ns(entry.time)
        if not self._condemned and history.phase is not Bucket.STOPPED:
            if entry.outcome is Outcome.FAILED:
                self._break(history, self._fault_now(history, at, "unknown", named=False), at)
            else:
                history.enter(Bucket.STOPPED, at)
        self._condemned = True
        self._end_attempt(max(at, history.frontier), entry.outcome)

    def _stop(self, history: History, at: int, cause: str) -> None:
        if history.phase is not Bucket.STOPPED:
            history.enter(Bucket.STOPPED, at)
            history.fault(cause, planned=True)
            self._open = None

    def _ended(self, history: History, entry: Ended) -> None:
        asked = history.phase is Bucket.STOPPED
        at = history.commit(_ns(entry.time))
        if entry.outcome is not Outcome.FINISHED and history.lineage.last_faults == len(history.faults):
            # Steps that no checkpoint holds are lost now, and something must answer for them.
            planned = asked or entry.outcome is Outcome.STOPPED
            history.fault("(stop)" if planned else "unknown", planned=planned)
        self._end_attempt(at, entry.outcome)
        history.enter(Bucket.STOPPED, at)
        self._outcome = entry.outcome
        self._open = None
        self._condemned = True

    def _supervisor_lost(self, history: History, entry: SupervisorLost) -> None:
        if self._away is None:
            self._away = max(_ns(entry.time), self._totals.watched_from, history.start)

    def _supervisor_attached(self, history: History, entry: SupervisorAttached) -> None:
        at = _ns(entry.time)
        if self._away is not None:
            self._totals.unsupervised += max(0, at - self._away)
            self._totals.watched_from = max(at, self._away)
            self._away = None

    # What breaks

    def _fault_began(self, history: History, entry: FaultBegan) -> None:
        at = _ns(entry.time)
        if self._gap is None or self._gap.fault.attempt != entry.attempt:
            self._told_sign = entry.attempt, at
        else:
            self._gap.last_sign(at)

    def _fault_detected(self, history: History, entry: FaultDetected) -> None:
        at = _ns(entry.time)
        if (self._attempts and entry.attempt < history.attempt) or history.phase is Bucket.STOPPED:
            self._totals.ignored += 1
            return
        fault = history.faults[self._open] if self._open is not None else None
        if self._condemned and fault is not None and not fault.planned:
            if fault.named:
                fault.consequences += 1
                return
            fault.cause, fault.blame, fault.named = entry.cause, entry.blame, True
            fault.detected = history.enter(Bucket.DIAGNOSING, at)
            return
        self._break(history, self._fault_now(history, at, entry.cause, entry.blame), at)
        history.phase = Bucket.DIAGNOSING

    def _fault_now(
        self, history: History, at: int, cause: str, blame: Blame = Blame.UNKNOWN, named: bool = True
    ) -> int:
        number = history.fault(cause, blame=blame, at=max(at, history.frontier))
        history.faults[number].named = named
        return number

    def _break(self, history: History, number: int, at: int) -> None:
        """The time up to `at` ends with a fault: what was done before its last sign of life, and its
        detection."""
        fault = history.faults[number]
        at = max(at, history.frontier)
        sign = self._sign if self._sign is not None else at
        if self._told_sign is not None and self._told_sign[0] == fault.attempt:
            sign = self._told_sign[1]
        self._told_sign = None
        began = min(max(sign, history.frontier), at)
        if history.phase is Bucket.PRODUCTIVE:
            before = history.segment(history.frontier, began, Bucket.REDONE, number)
        else:
            before = history.segment(history.frontier, began, history.phase, history.owner)
        self._gap = Gap(fault, before, history.segment(began, at, Bucket.DETECTING, number))
        fault.began, fault.detected = began, at
        history.phase, history.owner = Bucket.DETECTING, number
        self._open = number
        self._condemned = True
        if self._attempts and self._attempts[-1].ended is None:
            self._attempts[-1].fault = fault

    def _end_attempt(self, at: int, outcome: Outcome | None) -> None:
        if self._attempts and self._attempts[-1].ended is None:
            self._attempts[-1].ended = max(at, self._attempts[-1].started)
            self._attempts[-1].outcome = outcome or Outcome.FAILED

    # What the trainer says

    def _of_this_attempt(self, history: History, attempt: int, begin: int) -> bool:
        if self._attempts and attempt < history.attempt:
            self._totals.ignored += 1
            return False
        if not self._attempts or attempt > history.attempt:
            self._start(history, attempt, begin)
        return True

    def _run_started(self, history: History, entry: RunStarted) -> None:
        at = _earlier(entry.t, entry.time)
        if self._of_this_attempt(history, entry.attempt, at):
            self._sign = max(at, self._sign or 0)

    def _resumed(self, history: History, entry: Resumed) -> None:
        at = _earlier(entry.t, entry.time)
        if not self._of_this_attempt(history, entry.attempt, at - _ns(entry.seconds)):
            return
        if entry.t is not None and (entry.step, entry.t) in self._resumes:
            self._totals.ignored += 1
            return
        self._resumes.add((entry.step, entry.t))
        if history.phase is Bucket.PRODUCTIVE:
            number = self._fault_now(history, at, entry.cause or "roll_back")
            fault = history.faults[number]
            fault.began = fault.detected = begin = max(history.frontier, at - _ns(entry.seconds))
            history.segment(history.frontier, begin, Bucket.REDONE, number)
            history.phase, history.owner, self._open = Bucket.RESTARTING, number, number
            self._gap = None
            history.commit(at)
        elif entry.reason == "roll_back" and self._open is not None and history.phase is not Bucket.STOPPED:
            history.enter(Bucket.RESTARTING, at, self._open)
            self._condemned = False
            if self._attempts[-1].fault is history.faults[self._open]:
                self._attempts[-1].fault = None
        self._sign = max(at, self._sign or 0)
        history.go_back(entry.step)
        history.saved = entry.step
        self._latest_step = entry.step

    def _step(self, history: History, entry: Step) -> None:
        seconds = _ns(entry.seconds)
        at = _earlier(entry.t, entry.time)
        if (entry.attempt != history.attempt or not self._attempts) and not self._of_this_attempt(
            history, entry.attempt, at - seconds
        ):
            return
        if entry.step <= self._latest_step:
            self._totals.ignored += 1
            return
        if history.phase is Bucket.PRODUCTIVE:
            start, faults = history.frontier, len(history.faults)
        elif self._condemned and self._gap and (late := self._gap.give_back(history, at)) is not None:
            start, faults = late, self._gap.detecting.owner
        else:
            start, faults = history.commit(at - seconds), len(history.faults)
            if not self._condemned and history.phase is not Bucket.STOPPED:
                self._repaired(history, start)
                history.phase = Bucket.PRODUCTIVE
        at = max(at, start)
        stall = min(_ns(entry.checkpoint_stall_seconds), at - start)
        if len(history.lineage) and history.lineage.last_step >= entry.step:
            history.go_back(entry.step - 1)
        history.lineage.push(entry.step, start, at, stall, entry.tokens, faults, entry.attempt)
        history.stalls += stall
        history.frontier = max(history.frontier, at)
        self._latest_step = entry.step
        self._totals.step(entry.tokens)
        attempt = self._attempts[-1]
        attempt.steps += 1
        attempt.last_step = entry.step
        if attempt.first_step is None:
            attempt.first_step = entry.step

    def _repaired(self, history: History, at: int) -> None:
        if self._open is not None:
            for fault in reversed(history.faults):
                if fault.planned or fault.resumed is not None:
                    break
                fault.resumed = at
        self._open = None

    def _checkpoint_saved(self, history: History, entry: CheckpointSaved) -> None:
        if self._attempts and entry.attempt < history.attempt:
            self._totals.ignored += 1
            return
        self._totals.saves += 1
        history.saved = max(history.saved, entry.step)
        if self._condemned and self._open is not None:
            history.faults[self._open].saved = max(history.faults[self._open].saved, entry.step)


_AFTER_DECISION = {"probe": Bucket.DIAGNOSING, "wait": Bucket.WAITING}
"""What a decision that is to be followed by another one leads to."""
_AFTER_THE_END = (
    Submitted,
    AttemptStarted,
    CheckpointSaved,
    FaultBegan,
    Diagnosed,
    SupervisorLost,
    SupervisorAttached,
)
"""Entries that still count when the job is over: it begins again, or hindsight."""


def _ns(seconds: float) -> int:
    ns = round(seconds * NS) if 0 <= seconds <= LATEST else -1
    if ns < 0:
        raise ValueError(f"a time in seconds from 0 to {LATEST:g} is expected, found {seconds!r}")
    return ns


def _earlier(t: float | None, time: float) -> int:
    return _ns(time if t is None or t > time else t)


def _down(history: History) -> Bucket:
    return Bucket.STARTING if history.owner == START else Bucket.RESTARTING
