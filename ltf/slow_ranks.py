"""Which ranks are slow, and which are unsteady: by what each says of its own work."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ltf.config import schema
from ltf.findings import Finding, Json, Severity
from ltf.timing import OwnSeconds

JITTER_STEPS = 100
"""Steps of a rank's own past in which jitter is looked for: enough for a 95th percentile."""
JITTER_BURSTS = 3
"""Slow steps must come and go at least so often; fewer are a rank that became slow: another finding."""


class SlowRanks:
    """Says which ranks became slow or unsteady, and which are so no longer. Pure and the same on every rank.

    Only even work is compared, see `OwnSeconds`: in expert-parallel layers not the experts', and nothing of
    such a layer where it is compiled. Peers are the other ranks of its group, those that do the same work (a
    pipeline's first stage is no peer of its last).

    *Slow*: over the last `settings.slow_steps` steps, the median of a rank's seconds a row relative to the
    median of its peers' at the same step is `settings.slow_factor` or more, and nine of ten steps' are well
    above 1: where a host is shared, single steps take now this rank longer and now that, and half of them may
    by chance. A rank without peers is not called slow. *Jitter*: of its last `JITTER_STEPS` steps, the 95th
    percentile is `settings.jitter_factor` times its own median or more, and its peers' are not as unsteady:
    this over their median is as much.

    Either is told once it has cost `settings.lost_seconds`, and is over when the factor's excess over 1 has
    fallen to half the limit's.
    """

    def __init__(self, settings: schema.Noise, groups: Sequence[Hashable]) -> None:
        """`groups`: each rank's."""
        self._settings = settings
        self._groups = [
            [rank for rank, theirs in enumerate(groups) if theirs == group] for group in dict.fromkeys(groups)
        ]
        self._pasts = [_Past.empty(settings.slow_steps) for _ in groups]

    def observe(self, step: int, own: Sequence[OwnSeconds]) -> list[Finding]:
        """By rank; what changed with this step."""
        if len(own) != len(self._pasts):
            raise ValueError(f"step {step}: {len(own)} measurements of {len(self._pasts)} ranks")
        speeds = [each.even_per_row for each in own]
        peers = self._of_others(speeds)
        for past, speed, others, rows in zip(
            self._pasts, speeds, peers, (each.rows for each in own), strict=True
        ):
            if _measured(speed):
                past.own.append((step, speed, rows))
                if _measured(others):
                    past.ratios.append((step, speed / others, (speed - others) * rows))
        measured = [rank for rank, speed in enumerate(speeds) if _measured(speed)]
        spreads = [_spread(past.own) for past in self._pasts]
        usual = self._of_others([math.nan if spread is None else spread.factor for spread in spreads])
        found = []
        for rank in measured:
            found += [self._slow(step, rank), self._jitter(step, rank, spreads[rank], usual[rank])]
        return [finding for finding in found if finding is not None]

    def state(self) -> dict[str, Json]:
        """For a checkpoint."""
        return {"ranks": [past.state() for past in self._pasts]}

    def restore(self, state: dict[str, Json]) -> None:
        """Take up a state; one of another number of ranks means nothing here and is left."""
        ranks = state["ranks"]
        if isinstance(ranks, list) and len(ranks) == len(self._pasts):
            self._pasts = [_Past.of(each, self._settings.slow_steps) for each in ranks]

    def _of_others(self, values: Sequence[float]) -> list[float]:
        """By rank, the median of its peers'; NaN without any."""
        out = [math.nan] * len(values)
        for group in self._groups:
            known = sorted((rank for rank in group if _measured(values[rank])), key=lambda r: values[r])
            for place, rank in enumerate(known):
                # Of the others in order, the one or the two in the middle.
                count = len(known) - 1
                middle = {(count - 1) // 2, count // 2} if count else set()
                found = [values[known[each + (each >= place)]] for each in middle]
                out[rank] = sum(found) / len(found) if found else math.nan
        return out

    def _slow(self, step: int, rank: int) -> Finding | None:
        past, limit = self._pasts[rank], self._settings.slow_factor
        if len(past.ratios) < self._settings.slow_steps:
            return None
        factor = median(ratio for _, ratio, _ in past.ratios)
        costs = [(at, lost) for at, ratio, lost in past.ratios if ratio >= limit]
        steady = sorted(ratio for _, ratio, _ in past.ratios)[len(past.ratios) // 10] >= _calm(limit)
        change = past.slow.follow(step, factor, limit, costs, self._settings.lost_seconds, certain=steady)
        if change is None:
            return None
        evidence: dict[str, Json] = {"factor": factor, "since": change.since, "limit": limit}
        if change.over:
            return Finding(
                kind="slow_rank.over",
                severity=Severity.INFO,
                step=step,
                message=f"rank {rank}, slow since step {change.since}, keeps up again: "
                f"{factor:.2f} times its peers",
                ranks=(rank,),
                evidence=evidence,
            )
        return Finding(
            kind="slow_rank",
            severity=Severity.WARNING,
            step=step,
            message=f"rank {rank} takes {factor:.2f} times as long as its peers for its own work since "
            f"step {change.since} (limit {limit:g}, median of {len(past.ratios)} steps)",
            ranks=(rank,),
            evidence={**evidence, "lost_seconds": change.lost},
        )

    def _jitter(self, step: int, rank: int, spread: _Spread | None, usual: float) -> Finding | None:
        past, limit = self._pasts[rank], self._settings.jitter_factor
        if spread is None:
            return None
        # Where all are unsteady, no one rank is to blame.
        factor = spread.factor / max(1.0, usual) if _measured(usual) else spread.factor
        slow = limit * spread.median
        costs = [(at, (each - spread.median) * rows) for at, each, rows in past.own if each >= slow]
        if past.jitter.since is None and _bursts(past.own, slow) < JITTER_BURSTS:
            return None
        change = past.jitter.follow(step, factor, limit, costs, self._settings.lost_seconds)
        if change is None:
            return None
        if change.over:
            return Finding(
                kind="jitter.over",
                severity=Severity.INFO,
                step=step,
                message=f"rank {rank}, unsteady since step {change.since}, is steady again: {factor:.2f}",
                ranks=(rank,),
                evidence={"factor": factor, "since": change.since, "limit": limit},
            )
        return Finding(
            kind="jitter",
            severity=Severity.WARNING,
            step=step,
            message=f"rank {rank} is unsteady since step {change.since}: its slowest twentieth of "
            f"{len(past.own)} steps takes {spread.factor:.2f} times its own median or more (limit {limit:g})",
            ranks=(rank,),
            evidence={
                "factor": spread.factor,
                "since": change.since,
                "limit": limit,
                "lost_seconds": change.lost,
                "median_seconds_per_row": spread.median,
                "p95_seconds_per_row": spread.high,
            },
        )


@dataclass(frozen=True)
class _Change:
    over: bool
    since: int
    lost: float


@dataclass
class _Standing:
    """`since`: first step of what is under suspicion, or told. `lost`: seconds that it cost so far."""

    since: int | None = None
    lost: float = 0.0
    told: bool = False

    def follow(
        self,
        step: int,
        factor: float,
        limit: float,
        costs: Sequence[tuple[int, float]],
        least: float,
        *,
        certain: bool = True,
    ) -> _Change | None:
        """`costs`: (step, seconds lost) of the slow steps in the window, oldest first."""
        if factor < _calm(limit):
            over = _Change(True, self.since, self.lost) if self.told and self.since is not None else None
            self.since, self.lost, self.told = None, 0.0, False
            return over
        if self.since is None:
            if factor < limit or not certain or not costs:
                return None
            self.since, self.lost = costs[0][0], sum(lost for _, lost in costs)
        else:
            self.lost += sum(lost for at, lost in costs if at == step)
        if self.told or factor < limit or not certain or self.lost < least:
            return None
        self.told = True
        return _Change(False, self.since, self.lost)


@dataclass
class _Past:
    """`ratios`: (step, over peers, seconds lost); `own`: (step, seconds a row, rows). Newest last."""

    ratios: deque[tuple[int, float, float]]
    own: deque[tuple[int, float, int]] = field(default_factory=lambda: deque(maxlen=JITTER_STEPS))
    slow: _Standing = field(default_factory=_Standing)
    jitter: _Standing = field(default_factory=_Standing)

    @classmethod
    def empty(cls, slow_steps: int) -> _Past:
        return cls(deque(maxlen=slow_steps))

    @classmethod
    def of(cls, state: Any, slow_steps: int) -> _Past:
        past = cls.empty(slow_steps)
        past.ratios.extend((step, ratio, lost) for step, ratio, lost in state["ratios"])
        past.own.extend((step, own, rows) for step, own, rows in state["own"])
        past.slow, past.jitter = _Standing(**state["slow"]), _Standing(**state["jitter"])
        return past

    def state(self) -> dict[str, Json]:
        return {
            "ratios": [list(entry) for entry in self.ratios],
            "own": [list(entry) for entry in self.own],
            "slow": dict(vars(self.slow)),
            "jitter": dict(vars(self.jitter)),
        }


@dataclass(frozen=True)
class _Spread:
    """Of a rank's steps, seconds a row: median and 95th percentile."""

    median: float
    high: float

    @property
    def factor(self) -> float:
        return self.high / self.median


def _spread(own: Sequence[tuple[int, float, int]]) -> _Spread | None:
    """None before there are enough steps."""
    if len(own) < JITTER_STEPS:
        return None
    seconds = sorted(each for _, each, _ in own)
    return _Spread(median(seconds), seconds[math.ceil(0.95 * len(seconds)) - 1])


def _calm(limit: float) -> float:
    return 1 + (limit - 1) / 2


def _measured(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0


def _bursts(own: Iterable[tuple[int, float, int]], limit: float) -> int:
    """How many runs of slow steps there are."""
    slow = [each >= limit for _, each, _ in own]
    return sum(now and not before for before, now in zip([False, *slow], slow, strict=False))
