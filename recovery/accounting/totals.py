"""Sums over a history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from recovery.accounting.account import LOST, NS, Account, AttemptTime, Bucket, FaultTime, LostTime
from recovery.accounting.entries import Outcome
from recovery.accounting.history import SAVES, Attempt, Fault, History
from recovery.blame import Blame


@dataclass
class Totals:
    """What is counted as entries come, apart from time."""

    steps: int = 0
    tokens: int = 0
    tokens_known: bool = False
    saves: int = 0
    ignored: int = 0
    unsupervised: int = 0
    watched_from: int = 0

    def step(self, tokens: int | None) -> None:
        self.steps += 1
        if tokens is not None:
            self.tokens += tokens
            self.tokens_known = True

    def surviving(self, history: History, outcome: Outcome | None) -> int:
        """How many entries of the lineage are part of the job's state. A job that ended without finishing has
        what its checkpoints hold."""
        if outcome is None or outcome is Outcome.FINISHED:
            return len(history.lineage)
        return history.lineage.after(history.saved)


@dataclass
class _Lost:
    """Lost nanoseconds by owner and bucket."""

    by_owner: dict[int, dict[Bucket, int]] = field(default_factory=dict)

    def add(self, owner: int, bucket: Bucket, ns: int) -> None:
        buckets = self.by_owner.setdefault(owner, {})
        buckets[bucket] = buckets.get(bucket, 0) + ns


def total(
    history: History,
    until: int,
    attempts: Sequence[Attempt],
    outcome: Outcome | None,
    away: int | None,
    totals: Totals,
) -> Account:
    """The account of `history` up to `until`, which is no earlier than its frontier."""
    kept = totals.surviving(history, outcome)
    lost = _Lost()
    stopped = 0
    for segment in history.segments:
        if segment.bucket is Bucket.STOPPED:
            stopped += segment.end - segment.start
        else:
            lost.add(segment.owner, segment.bucket, segment.end - segment.start)
    for segment in history.redone:
        if segment.bucket is Bucket.REDONE:
            lost.add(segment.owner, Bucket.REDONE, segment.end - segment.start)
    for stretch in history.lineage.stretches(kept):
        lost.add(history.culprit(stretch), Bucket.REDONE, stretch.stall - stretch.start)
    lost.add(SAVES, Bucket.CHECKPOINT, history.stalls)
    productive = history.lineage.work(kept)
    hour = max(history.start, until - 3600 * NS)
    last_hour = history.lineage.work_between(hour, until, kept)
    at_risk = productive - history.lineage.work(min(kept, history.lineage.after(history.saved)))
    if outcome is not None:
        at_risk = 0
    if until > history.frontier:
        present = until - history.frontier
        match history.phase:
            case Bucket.PRODUCTIVE:
                productive += present
                at_risk += present
                last_hour += until - max(history.frontier, hour)
            case Bucket.STOPPED:
                stopped += present
            case phase:
                lost.add(history.owner, phase, present)
    buckets = dict.fromkeys(Bucket, 0)
    for by_bucket in lost.by_owner.values():
        for bucket, ns in by_bucket.items():
            buckets[bucket] += ns
    buckets[Bucket.PRODUCTIVE] = productive
    buckets[Bucket.STOPPED] = stopped
    told = [_attempt(one, outcome) for one in attempts]
    known = totals.tokens_known
    return Account(
        submitted=history.start,
        until=until,
        phase=history.phase,
        outcome=outcome,
        buckets=buckets,
        productive_last_hour=last_hour,
        lost=_by_cause(history.faults, lost),
        faults=tuple(
            _fault(fault, lost.by_owner.get(number, {}))
            for number, fault in enumerate(history.faults)
            if not fault.planned
        ),
        attempts=tuple(told),
        last_step=history.lineage.last_step if kept == len(history.lineage) else history.saved,
        steps_done=totals.steps,
        steps_surviving=history.lineage.steps(kept),
        saved_step=history.saved,
        at_risk=at_risk,
        tokens=history.lineage.tokens(kept) if known else None,
        tokens_done=totals.tokens if known else None,
        saves=totals.saves,
        uptime=sum((one.ended or until) - one.started for one in told),
        node_uptime=sum(((one.ended or until) - one.started) * len(one.nodes) for one in told)
        if all(one.nodes for one in told)
        else None,
        unsupervised=totals.unsupervised + (max(0, until - away) if away is not None else 0),
        ignored=totals.ignored,
    )


def _attempt(one: Attempt, outcome: Outcome | None) -> AttemptTime:
    broke = one.fault is not None
    ended = max(one.started, one.fault.began) if one.fault is not None else one.ended
    return AttemptTime(
        attempt=one.attempt,
        nodes=one.nodes,
        started=one.started,
        ended=ended,
        outcome=Outcome.FAILED if broke else one.outcome,
        first_step=one.first_step,
        last_step=one.last_step,
        steps=one.steps,
    )


def _fault(fault: Fault, buckets: dict[Bucket, int]) -> FaultTime:
    return FaultTime(
        attempt=fault.attempt,
        cause=fault.cause,
        blame=fault.blame,
        began=fault.began,
        detected=fault.detected,
        resumed=fault.resumed,
        consequences=fault.consequences,
        buckets=_in_order(buckets),
    )


def _by_cause(faults: Sequence[Fault], lost: _Lost) -> tuple[LostTime, ...]:
    together: dict[tuple[str, Blame, bool], tuple[int, _Lost]] = {}
    for number, fault in enumerate(faults):
        key = fault.cause, fault.blame, fault.planned
        count, sums = together.setdefault(key, (0, _Lost()))
        for bucket, ns in lost.by_owner.get(number, {}).items():
            sums.add(0, bucket, ns)
        together[key] = count + (not fault.planned), sums
    rows = [
        LostTime(cause, fault_blame, planned, count, _in_order(sums.by_owner.get(0, {})))
        for (cause, fault_blame, planned), (count, sums) in together.items()
    ]
    wanted = [row for row in rows if row.total or row.faults]
    return tuple(sorted(wanted, key=lambda row: (-row.total, row.cause, row.blame)))


def _in_order(buckets: dict[Bucket, int]) -> dict[Bucket, int]:
    return {bucket: buckets[bucket] for bucket in LOST if buckets.get(bucket)}
