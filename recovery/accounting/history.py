"""The past of a job with its labels, which hindsight may still change.

A history is cut into pieces that touch: segments (time of one bucket that is no step), the steps of the
lineage, and the steps that were taken back. `frontier` is the end of the last piece; what follows it belongs
to the present phase. A piece never reaches behind the frontier, so that every nanosecond is in exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recovery.accounting.account import LOST, Bucket, Span
from recovery.accounting.entries import Outcome
from recovery.accounting.lineage import Lineage, Stretch
from recovery.blame import Blame

START, SAVES = 0, 1
"""Owners of lost time that no fault caused; the faults follow them in the same list."""


@dataclass(slots=True)
class Fault:
    attempt: int
    cause: str
    blame: Blame = Blame.UNKNOWN
    began: int = 0
    detected: int = 0
    saved: int = 0
    """Newest step that a checkpoint held when it happened: it cost none of the steps up to there."""
    planned: bool = False
    named: bool = True
    """False while nobody has said what it is."""
    resumed: int | None = None
    consequences: int = 0


@dataclass(slots=True)
class Segment:
    start: int
    end: int
    bucket: Bucket
    owner: int
    attempt: int


@dataclass(slots=True)
class Attempt:
    attempt: int
    nodes: tuple[str, ...]
    started: int
    ended: int | None = None
    outcome: Outcome | None = None
    fault: Fault | None = None
    first_step: int | None = None
    last_step: int | None = None
    steps: int = 0


class History:
    """Steps and phases of a job so far. Times are nanoseconds; `phase` PRODUCTIVE stands for training."""

    def __init__(self, start: int) -> None:
        self.start = self.frontier = start
        self.phase = Bucket.STARTING
        self.owner = START
        self.attempt = -1
        self.lineage = Lineage()
        self.segments: list[Segment] = []
        self.redone: list[Segment] = []
        self.stalls = 0
        self.faults = [
            Fault(-1, "(start)", planned=True),
            Fault(-1, "(checkpoint saves)", planned=True),
        ]
        self.saved = 0

    def commit(self, until: int) -> int:
        """What lies between the frontier and `until` is of the present phase, for good; the new frontier."""
        if until > self.frontier:
            if self.phase is Bucket.PRODUCTIVE:
                self.lineage.push_work(self.frontier, until, len(self.faults), self.attempt)
            else:
                self.segment(self.frontier, until, self.phase, self.owner)
            self.frontier = until
        return self.frontier

    def enter(self, phase: Bucket, at: int, owner: int | None = None) -> int:
        """A new phase begins at `at`, or at the frontier if that is later; when it does."""
        at = self.commit(at)
        self.phase = phase
        self.owner = self.owner if owner is None else owner
        return at

    def segment(self, start: int, end: int, bucket: Bucket, owner: int) -> Segment:
        self.segments.append(Segment(start, end, bucket, owner, self.attempt))
        self.frontier = max(self.frontier, end)
        return self.segments[-1]

    def fault(self, cause: str, *, blame: Blame = Blame.UNKNOWN, at: int = 0, planned: bool = False) -> int:
        """A new owner of lost time; its number."""
        at = at or self.frontier
        self.faults.append(Fault(self.attempt, cause, blame, at, at, self.saved, planned))
        return len(self.faults) - 1

    def go_back(self, step: int) -> None:
        """The state is that after `step` again: later steps were for nothing."""
        kept = self.lineage.after(step)
        self.saved = min(self.saved, step)
        if kept == len(self.lineage):
            return
        if self.lineage.last_faults == len(self.faults):
            self.fault("unexplained")
        for stretch in self.lineage.stretches(kept):
            self._redone(stretch.start, stretch.stall, Bucket.REDONE, self.culprit(stretch), stretch.attempt)
            self._redone(stretch.stall, stretch.end, Bucket.CHECKPOINT, SAVES, stretch.attempt)
        self.lineage.cut(kept)

    def culprit(self, lost: Stretch) -> int:
        """Who made a step be redone: the first fault after it that no checkpoint had saved it from. A step
        that was saved from all of them went with the last one, whose restart passed that checkpoint
        over."""
        for number in range(lost.faults, len(self.faults)):
            if lost.step > self.faults[number].saved:
                return number
        return len(self.faults) - 1

    def spans(self, until: int, kept: int) -> tuple[Span, ...]:
        """All pieces in order, neighbours that are alike made one; the lineage survives up to `kept`
        entries."""
        pieces = [*self.segments, *self.redone, *self._lineage_pieces(kept)]
        pieces.sort(key=lambda piece: piece.start)
        if until > self.frontier:
            pieces.append(Segment(self.frontier, until, self.phase, self.owner, self.attempt))
        spans: list[Span] = []
        start = self.start
        before: Segment | None = None
        for piece in pieces:
            if piece.end == piece.start:
                continue
            if before is not None and not _alike(before, piece):
                spans.append(self._span(before, start))
                start = piece.start
            before = piece
        if before is not None:
            spans.append(self._span(before, start))
        return tuple(spans)

    def _span(self, piece: Segment, start: int) -> Span:
        cause = self.faults[piece.owner].cause if piece.bucket in LOST else ""
        attempt = piece.attempt if piece.attempt >= 0 else None
        return Span(start, piece.end, piece.bucket, attempt, cause)

    def _redone(self, start: int, end: int, bucket: Bucket, owner: int, attempt: int) -> None:
        piece = Segment(start, end, bucket, owner, attempt)
        last = self.redone[-1] if self.redone else None
        if last is not None and last.end == start and _alike(last, piece):
            last.end = end
        elif end > start:
            self.redone.append(piece)

    def _lineage_pieces(self, kept: int) -> Iterator[Segment]:
        for number, one in enumerate(self.lineage.stretches()):
            if number < kept:
                yield Segment(one.start, one.stall, Bucket.PRODUCTIVE, START, one.attempt)
            else:
                yield Segment(one.start, one.stall, Bucket.REDONE, self.culprit(one), one.attempt)
            if one.end > one.stall:
                yield Segment(one.stall, one.end, Bucket.CHECKPOINT, SAVES, one.attempt)


def _alike(one: Segment, other: Segment) -> bool:
    return (
        one.bucket is other.bucket
        and one.attempt == other.attempt
        and (one.owner == other.owner or one.bucket not in LOST)
    )


@dataclass(slots=True)
class Gap:
    """What lies around a fault's last sign of life: that may still be told better."""

    fault: Fault
    before: Segment
    detecting: Segment

    def last_sign(self, at: int) -> None:
        """It was at `at`, as far as that lies in the gap."""
        at = min(max(at, self.before.start), self.detecting.end)
        self.fault.began = self.before.end = self.detecting.start = at

    def give_back(self, history: History, at: int) -> int | None:
        """Make room for a step of the fault's attempt that ended at `at`, before the fault was known; where
        it starts, or None if the gap is not the place for it."""
        start = self.before.start
        later = history.lineage.last_end > start or not start < at < self.detecting.end
        if later or self.before.bucket is not Bucket.REDONE or self.before.attempt != history.attempt:
            return None
        self.before.start = at
        self.last_sign(max(self.before.end, at))
        return start
