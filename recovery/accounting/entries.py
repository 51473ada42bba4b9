"""What happened to a job, one frozen value each: the words of its journal.

`time` is always the supervisor's wall clock, seconds since 1970-01-01 UTC, when the entry was made; the one
exception is :class:`FaultBegan`. Events of the trainer also carry `t`, the trainer's own time of them: a
supervisor that was away reads them late. `attempt` counts from 0, as the trainer's events do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from recovery.blame import Blame


class Outcome(StrEnum):
    """How an attempt or a job ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """By a person, or by a budget that a person set."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job was asked for: its account begins. A second one, after the job's end, asks for it again."""

    time: float
    job: str = ""
    nodes: tuple[str, ...] = ()
    spares: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Validating:
    """Nodes are being checked, and the job waits for that."""

    time: float
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Validated:
    """The check of the nodes is over."""

    time: float
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WaitingForNodes:
    """There are not enough nodes for the job at present."""

    time: float
    wanted: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GotNodes:
    """The wait for nodes is over."""

    time: float
    nodes: tuple[str, ...] = ()
    spares: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """All ranks were told to start."""

    time: float
    attempt: int
    nodes: tuple[str, ...] = ()
    ranks: int = 0


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The trainer's first word in an attempt."""

    time: float
    attempt: int
    t: float | None = None
    steps: int = 0
    """Optimizer steps that the run is to take in all; 0 where unknown."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """Training goes on from the state after `step`; steps beyond it are lost."""

    time: float
    attempt: int
    step: int
    reason: str = "restart"
    """``restart``: a new attempt. ``roll_back``: the trainer itself went back, in the running process."""
    seconds: float = 0.0
    """That loading took."""
    t: float | None = None
    checkpoint: str = ""
    cause: str = ""
    """Of a roll-back: the guard's finding, where the supervisor knows it."""


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step is done."""

    time: float
    attempt: int
    step: int
    seconds: float = 0.0
    tokens: int | None = None
    checkpoint_stall_seconds: float = 0.0
    """Of `seconds`, that training stood still for a save."""
    loss: float | None = None
    t: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint of the state after `step` is durable."""

    time: float
    attempt: int
    step: int
    seconds: float = 0.0
    stall_seconds: float = 0.0
    t: float | None = None


@dataclass(frozen=True, slots=True)
class FaultBegan:
    """`time` is the last sign of life before a fault of `attempt`. It is known only afterwards: this is the
    one entry whose time lies before that of the entries around it. It may come before or after the
    :class:`FaultDetected` that it belongs to."""

    time: float
    attempt: int


@dataclass(frozen=True, slots=True)
class FaultDetected:
    """The supervisor knows that something broke. The first one of an attempt is its fault, the others are
    consequences."""

    time: float
    attempt: int
    cause: str = "unknown"
    blame: Blame = Blame.UNKNOWN
    nodes: tuple[str, ...] = ()
    """That the evidence proves to be the culprits."""
    ranks: tuple[int, ...] = ()
    message: str = ""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosing:
    """The cause is being looked for: probes, stacks, logs."""

    time: float
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Diagnosed:
    """What the fault of `attempt` was; replaces what was believed when it was detected."""

    time: float
    attempt: int
    cause: str = "unknown"
    blame: Blame = Blame.UNKNOWN
    nodes: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decided:
    """What is to be done: ``stop`` ends the job, ``continue`` lets the running attempt go on, ``probe`` and
    ``wait`` (for nodes) put the decision off; every other one is some kind of restart."""

    time: float
    decision: str
    reason: str = ""
    attempt: int = 0
    replaced: tuple[str, ...] = ()
    """Nodes taken out."""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """No rank of the attempt runs any more."""

    time: float
    attempt: int
    outcome: Outcome = Outcome.FAILED
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Stopped:
    """Somebody asked the job to stop; it may still be saving its state."""

    time: float
    reason: str = ""
    by: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is over: its account ends, unless it is submitted or started again."""

    time: float
    outcome: Outcome = Outcome.FINISHED
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SupervisorLost:
    """Last sign of life of a supervisor; written by the one that follows it."""

    time: float


@dataclass(frozen=True, slots=True)
class SupervisorAttached:
    """A supervisor watches the job again."""

    time: float
    supervisor: str = ""


Entry = (
    Submitted
    | Validating
    | Validated
    | WaitingForNodes
    | GotNodes
    | AttemptStarted
    | RunStarted
    | Resumed
    | Step
    | CheckpointSaved
    | FaultBegan
    | FaultDetected
    | Diagnosing
    | Diagnosed
    | Decided
    | AttemptEnded
    | Stopped
    | Ended
    | SupervisorLost
    | SupervisorAttached
)
