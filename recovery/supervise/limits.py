"""How long a rank may be silent: limits that a run teaches about itself.

Two clocks, neither of them a time of day. How long training stood still is what the trainer measured with its
own monotonic clock (`quiet_seconds`, `seconds` of its events). How long nothing was heard is measured by the
supervisor's monotonic clock, which callers give as `arrived` and `now`. A clock that is set, on a node or
here, therefore neither makes a rank overdue nor stretches a limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeGuard


class Silence(StrEnum):
    """What is not heard of. The first five are the phases of the trainer's heartbeats: its training thread
    does not get on. HEART: no heartbeat comes. OUTPUT: a trainer without events prints nothing."""

    START = "start"
    """Also a first step, which may compile, and a rank that has said nothing yet."""
    STEP = "step"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"
    REPLAY = "replay"
    HEART = "heart"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds. `floor`: a limit is never less. `unseen`: the limit before anything was seen."""

    floor: float
    unseen: float


@dataclass(frozen=True, slots=True)
class Patience:
    """A limit is `multiple` of the largest silence that ended well, and never under its floor."""

    multiple: float = 5.0
    start: Bounds = Bounds(60.0, 3600.0)
    step: Bounds = Bounds(30.0, 1800.0)
    checkpoint: Bounds = Bounds(60.0, 3600.0)
    evaluation: Bounds = Bounds(60.0, 3600.0)
    replay: Bounds = Bounds(60.0, 3600.0)
    heart: Bounds = Bounds(30.0, 120.0)
    """The trainer's default is a heartbeat every 10 s."""
    output: Bounds = Bounds(600.0, 3600.0)

    def __post_init__(self) -> None:
        if not self.multiple > 1:
            raise ValueError(f"multiple: expected more than 1, found {self.multiple}")
        for silence in Silence:
            bounds = self.of(silence)
            if not 0 < bounds.floor <= bounds.unseen:
                raise ValueError(f"{silence}: expected 0 < floor <= unseen, found {bounds}")

    def of(self, silence: Silence) -> Bounds:
        bounds: Bounds = getattr(self, silence.value)
        return bounds


@dataclass(frozen=True, slots=True)
class Overdue:
    """A rank that is silent for longer than its limit. `largest`: ever seen to end well, if any was."""

    rank: int
    silence: Silence
    seconds: float
    limit: float
    largest: float | None

    def __str__(self) -> str:
        what = {Silence.HEART: "sends no heartbeat", Silence.OUTPUT: "prints nothing"}
        why = "before any was seen" if self.largest is None else f"largest seen {self.largest:.1f} s"
        said = what.get(self.silence, f"does not get on ({self.silence})")
        return f"rank {self.rank} {said} for {self.seconds:.1f} s (limit {self.limit:.1f} s, {why})"


class Limits:
    """The limits of one job, over all its attempts, and who is over them. No clock of its own.

    Only a silence that ended teaches: a hang never stretches the limit that is to find it.
    """

    def __init__(self, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._largest: dict[Silence, float] = {}
        self._ranks: dict[int, _Rank] = {}
        self._attempt: int | None = None
        self._stepped = False

    def begin(self, attempt: int, ranks: Iterable[int], now: float, *, events: bool = True) -> None:
        """An attempt starts, or is taken over. `events`: whether its trainer is known to write any; of one
        that is not, the output is watched until its first event comes."""
        self._attempt, self._stepped = attempt, False
        self._ranks = {rank: _Rank(began=now, output=now, speaks=events) for rank in ranks}

    def observe(self, event: Mapping[str, Any], arrived: float) -> None:
        """One event of the trainer. Those of other attempts or ranks, and nonsense, are passed over."""
        watched = self._ranks.get(event["rank"]) if isinstance(event.get("rank"), int) else None
        if watched is None or event.get("attempt") != self._attempt:
            return
        watched.speaks, watched.output = True, arrived
        match event.get("event"):
            case "heartbeat":
                self._heartbeat(watched, event, arrived)
            case "step":
                self._learn(Silence.STEP if self._stepped else Silence.START, event.get("seconds"))
                self._stepped = True
            case "evaluation":
                self._learn(Silence.EVALUATION, event.get("seconds"))
            case "checkpoint_saved":
                self._learn(Silence.CHECKPOINT, event.get("stall_seconds"))
            case "resumed" if event.get("reason") == "restart":
                self._learn(Silence.START, event.get("seconds"))
            case "exited":
                self.ended(event["rank"])

    def printed(self, rank: int, arrived: float) -> None:
        """A rank wrote a line of output."""
        watched = self._ranks.get(rank)
        if watched is None:
            return
        if not watched.speaks:
            self._learn(Silence.OUTPUT, arrived - watched.output)
        watched.output = arrived

    def ended(self, rank: int) -> None:
        """A rank's process is over: it may be silent."""
        self._ranks.pop(rank, None)

    def limit(self, silence: Silence) -> float:
        """Seconds."""
        bounds, largest = self._patience.of(silence), self._largest.get(silence)
        if largest is None:
            return bounds.unseen
        return max(bounds.floor, self._patience.multiple * largest)

    def overdue(self, now: float) -> tuple[Overdue, ...]:
        """Who is over a limit, by rank. Read what has arrived first: silence here must not be one's own."""
        found = (self._of(rank, watched, now) for rank, watched in sorted(self._ranks.items()))
        return tuple(each for each in found if each is not None)

    def state(self) -> dict[str, Any]:
        """What was learned, for JSON. Who is silent now is not part of it: that is seen again."""
        return {"largest": {silence.value: self._largest[silence] for silence in sorted(self._largest)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what another supervisor of the job has learned."""
        learned = state.get("largest")
        for name, seconds in learned.items() if isinstance(learned, Mapping) else ():
            if name in set(map(str, Silence)):
                self._learn(Silence(name), seconds)

    def _heartbeat(self, watched: _Rank, event: Mapping[str, Any], arrived: float) -> None:
        phase, quiet, progress = event.get("phase"), event.get("quiet_seconds"), event.get("progress")
        if phase not in PHASES or not _is_span(quiet) or not isinstance(progress, int):
            return
        beat = _Beat(Silence(phase), float(quiet), progress, arrived, event.get("t"))
        before = watched.beat
        if before is not None:
            if beat.progress > before.progress:
                self._learn(self._phase(before), before.quiet)
            self._learn(Silence.HEART, _gap(before, beat))
        watched.beat = beat

    def _phase(self, beat: _Beat) -> Silence:
        return Silence.START if beat.phase is Silence.STEP and not self._stepped else beat.phase

    def _of(self, rank: int, watched: _Rank, now: float) -> Overdue | None:
        if not watched.speaks:
            return self._over(rank, Silence.OUTPUT, now - watched.output)
        beat = watched.beat
        if beat is None:
            return self._over(rank, Silence.START, now - watched.began)
        # What it told, not what that may have become since: the heart's limit is for that.
        silent = self._over(rank, Silence.HEART, now - beat.arrived)
        return silent or self._over(rank, self._phase(beat), beat.quiet)

    def _over(self, rank: int, silence: Silence, seconds: float) -> Overdue | None:
        limit = self.limit(silence)
        return Overdue(rank, silence, seconds, limit, self._largest.get(silence)) if seconds > limit else None

    def _learn(self, silence: Silence, seconds: object) -> None:
        if _is_span(seconds):
            self._largest[silence] = max(self._largest.get(silence, 0.0), float(seconds))


PHASES = frozenset(each.value for each in Silence) - {Silence.HEART.value, Silence.OUTPUT.value}


@dataclass(frozen=True, slots=True)
class _Beat:
    """`written`: by the node's time of day."""

    phase: Silence
    quiet: float
    progress: int
    arrived: float
    written: object


@dataclass(slots=True)
class _Rank:
    """`output`: when it was last heard in any way."""

    began: float
    output: float
    speaks: bool
    beat: _Beat | None = field(default=None)


def _gap(before: _Beat, beat: _Beat) -> float:
    """Between two heartbeats: the lesser of both clocks' answers, as a node's clock may be set and a
    supervisor that stood still reads many at once."""
    gap = beat.arrived - before.arrived
    if _is_number(beat.written) and _is_number(before.written):
        gap = min(gap, beat.written - before.written)
    return max(0.0, gap)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_span(value: object) -> TypeGuard[float]:
    return _is_number(value) and value >= 0
