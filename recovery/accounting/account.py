"""What an account says. Times inside are whole nanoseconds, so that sums are exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from recovery.accounting.entries import Outcome
from recovery.blame import Blame

NS = 1_000_000_000


class Bucket(StrEnum):
    """Where a second can go; each is in exactly one.

    *Training* is what happens from the first step after a start, a restart or a roll-back until the end of
    the attempt or the last sign of life before its fault. It is cut at the ends of steps: what lies between
    two steps (evaluation, logging, the wait for data) belongs to the later one."""

    PRODUCTIVE = "productive"
    """Steps that survive: no later attempt and no roll-back took them again, and when the job ended without
    finishing, a checkpoint holds them. For a running job, also the step that is being worked on."""
    REDONE = "redone"
    """Steps that do not survive, and the work on a step that never ended. Known in hindsight only."""
    STARTING = "starting"
    """From submission to the beginning of the first step, as long as no fault has happened; what validating
    and waiting take in between is theirs."""
    VALIDATING = "validating"
    """The job waits for nodes to be checked, at its start or in a restart."""
    DETECTING = "detecting"
    """From the last sign of life to the moment when the fault was known. Without a ``FaultBegan`` the last
    sign of life is the trainer's last event in the attempt, or the attempt's start if it wrote none."""
    DIAGNOSING = "diagnosing"
    """From there to the decision."""
    WAITING = "waiting"
    """There are not enough nodes."""
    RESTARTING = "restarting"
    """From the decision to the beginning of the next step: ending what is left of the old attempt, starting
    all ranks, loading. In a roll-back, the loading."""
    CHECKPOINT = "checkpoint"
    """Inside steps: training stood still for a save. It stays here when the step is lost."""
    STOPPED = "stopped"
    """Nothing was meant to run: after a decision or a request to stop (but for the steps that were still
    taken), and between the job's end and its next submission."""


NOT_LOST = (Bucket.PRODUCTIVE, Bucket.STOPPED)
LOST = tuple(bucket for bucket in Bucket if bucket not in NOT_LOST)


@dataclass(frozen=True)
class Span:
    """An uninterrupted stretch of one bucket, in nanoseconds since 1970."""

    start: int
    end: int
    bucket: Bucket
    attempt: int | None
    """None before the first attempt."""
    cause: str
    """What it was lost to; empty for time that was not lost."""


@dataclass(frozen=True)
class LostTime:
    """Time lost to one cause."""

    cause: str
    blame: Blame
    planned: bool
    """No fault: the job's start, its saves, a stop that somebody asked for."""
    faults: int
    buckets: Mapping[Bucket, int]

    @property
    def total(self) -> int:
        return sum(self.buckets.values())


@dataclass(frozen=True)
class FaultTime:
    """One fault and what it cost. A fault pays for its detection and everything until the next step, or until
    the next fault, and for the steps that it made redone."""

    attempt: int
    cause: str
    blame: Blame
    began: int
    """Last sign of life, nanoseconds."""
    detected: int
    resumed: int | None
    """When training went on; None when it has not."""
    consequences: int
    """Further faults that were reported of the same attempt."""
    buckets: Mapping[Bucket, int]


@dataclass(frozen=True)
class AttemptTime:
    """One start of all ranks."""

    attempt: int
    nodes: tuple[str, ...]
    started: int
    ended: int | None
    """The last sign of life where it broke, the end of the processes where it did not; None while it runs."""
    outcome: Outcome | None
    first_step: int | None
    last_step: int | None
    steps: int
    """Taken, those that were redone later among them."""


@dataclass(frozen=True)
class Account:
    """Where the time went: ``sum(buckets.values()) == wall``, and lost buckets add up to `lost`, exactly."""

    submitted: int
    until: int
    """The end of the job, or the time of asking, nanoseconds."""
    phase: Bucket
    """What the job is at; `productive` while it trains."""
    outcome: Outcome | None
    """None while the job is not over."""
    buckets: Mapping[Bucket, int]
    productive_last_hour: int
    lost: tuple[LostTime, ...]
    """Largest first."""
    faults: tuple[FaultTime, ...]
    attempts: tuple[AttemptTime, ...]
    last_step: int
    """Last step of the state as it is now; 0 for none."""
    steps_done: int
    steps_surviving: int
    saved_step: int
    """Newest state that a checkpoint holds; 0 for none."""
    at_risk: int
    """Productive time that no checkpoint holds yet: lost if a fault came now."""
    tokens: int | None
    """Of surviving steps, those that told theirs; None when no step did."""
    tokens_done: int | None
    """Of all steps, those redone too."""
    saves: int
    uptime: int
    """Time in attempts, from their start to their fault or end: the exposure to failures."""
    node_uptime: int | None
    """The same times nodes; None when the nodes of an attempt are not known."""
    unsupervised: int
    """Time without a supervisor. No bucket: training may have gone on."""
    ignored: int
    """Entries that could not be: events of an attempt that was over, steps told twice."""

    @property
    def wall(self) -> int:
        return self.until - self.submitted

    @property
    def ettr(self) -> float | None:
        """Effective training time ratio: productive / wall-clock; None for a job of no duration."""
        return self.buckets[Bucket.PRODUCTIVE] / self.wall if self.wall else None

    @property
    def ettr_last_hour(self) -> float | None:
        """The same over the hour before `until`, or over the whole of a younger job."""
        window = min(self.wall, 3600 * NS)
        return self.productive_last_hour / window if window else None

    @property
    def goodput(self) -> float | None:
        """Tokens of surviving steps per second of wall-clock; None where steps do not tell their tokens."""
        return self.tokens * NS / self.wall if self.tokens is not None and self.wall else None

    @property
    def throughput(self) -> float | None:
        """Tokens of all steps per second of training, saves included."""
        training = sum(self.buckets[b] for b in (Bucket.PRODUCTIVE, Bucket.REDONE, Bucket.CHECKPOINT))
        return self.tokens_done * NS / training if self.tokens_done is not None and training else None

    @property
    def lost_total(self) -> int:
        return sum(self.buckets[bucket] for bucket in LOST)


def document(account: Account) -> dict[str, object]:
    """The account as plain data for JSON, `ltpctl/account/1`: in seconds, and the sums in nanoseconds too."""
    return {
        "schema": "ltpctl/account/1",
        "submitted": account.submitted / NS,
        "until": account.until / NS,
        "phase": account.phase.value,
        "outcome": account.outcome.value if account.outcome else None,
        "wall_seconds": account.wall / NS,
        "wall_ns": account.wall,
        "buckets_seconds": _seconds(account.buckets),
        "buckets_ns": {bucket.value: ns for bucket, ns in account.buckets.items()},
        "ettr": account.ettr,
        "ettr_last_hour": account.ettr_last_hour,
        "tokens": account.tokens,
        "goodput_tokens_per_second": account.goodput,
        "throughput_tokens_per_second": account.throughput,
        "lost_seconds": account.lost_total / NS,
        "lost": [
            {
                "cause": one.cause,
                "blame": one.blame.value,
                "planned": one.planned,
                "faults": one.faults,
                "seconds": one.total / NS,
                "buckets_seconds": _seconds(one.buckets),
            }
            for one in account.lost
        ],
        "faults": [
            {
                "attempt": one.attempt,
                "cause": one.cause,
                "blame": one.blame.value,
                "began": one.began / NS,
                "detected": one.detected / NS,
                "resumed": None if one.resumed is None else one.resumed / NS,
                "consequences": one.consequences,
                "buckets_seconds": _seconds(one.buckets),
            }
            for one in account.faults
        ],
        "attempts": [
            {
                "attempt": one.attempt,
                "nodes": list(one.nodes),
                "started": one.started / NS,
                "ended": None if one.ended is None else one.ended / NS,
                "outcome": one.outcome.value if one.outcome else None,
                "first_step": one.first_step,
                "last_step": one.last_step,
                "steps": one.steps,
            }
            for one in account.attempts
        ],
        "steps": {
            "last": account.last_step,
            "done": account.steps_done,
            "surviving": account.steps_surviving,
            "saved": account.saved_step,
        },
        "at_risk_seconds": account.at_risk / NS,
        "saves": account.saves,
        "uptime_seconds": account.uptime / NS,
        "node_uptime_seconds": None if account.node_uptime is None else account.node_uptime / NS,
        "unsupervised_seconds": account.unsupervised / NS,
        "ignored_entries": account.ignored,
    }


def _seconds(buckets: Mapping[Bucket, int]) -> dict[str, float]:
    return {bucket.value: ns / NS for bucket, ns in buckets.items()}
