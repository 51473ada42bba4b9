"""What the supervisor sees of a running attempt at one moment, as frozen values. Times: seconds since 1970 by
the supervisor's clock; those of a node's own clock are brought to it before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from recovery.blame import Blame
from recovery.supervise.limits import Overdue
from recovery.supervise.words import Words


@dataclass(frozen=True, slots=True)
class RankSeen:
    """One rank. `status`: as Popen gives it (-9) or a shell does (137); None while it runs or nobody knows.

    `ended`: when. `killed_by_us`: the supervisor ended it. `quiet_seconds`: as its newest heartbeat told.
    `exit_reason`, `exit_message`: of its ``exited`` event. `words`: the last of its output.
    """

    rank: int
    node: str
    status: int | None = None
    ended: float | None = None
    killed_by_us: bool = False
    quiet_seconds: float | None = None
    heard: float | None = None
    exit_reason: str | None = None
    exit_message: str = ""
    words: Words | None = None

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0) and not self.killed_by_us


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """How a node answers. `misses`: consecutive ones, the last of them now. `missing_since`: the first."""

    node: str
    misses: int = 0
    missing_since: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class FindingSeen:
    """A finding from the event stream. `ranks`: proven culprits; `candidates`: one of these is it."""

    kind: str
    severity: str
    message: str
    step: int | None = None
    ranks: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()
    time: float | None = None


@dataclass(frozen=True, slots=True)
class KernelSeen:
    """A line of a node's kernel log that a signature knows. `convicts`: such a line takes the node out."""

    node: str
    kind: str
    text: str
    time: float
    blame: Blame = Blame.HARDWARE
    convicts: bool = False


@dataclass(frozen=True, slots=True)
class DiskSeen:
    """`least_bytes`: that the job needs free there, such as a checkpoint's size."""

    node: str
    path: str
    free_bytes: int
    least_bytes: int


@dataclass(frozen=True)
class Snapshot:
    now: float
    ranks: Sequence[RankSeen]
    nodes: Sequence[NodeSeen] = ()
    findings: Sequence[FindingSeen] = ()
    """Of this attempt, in the order of time."""
    kernel: Sequence[KernelSeen] = ()
    """Since the attempt began."""
    disks: Sequence[DiskSeen] = ()
    overdue: Sequence[Overdue] = ()
    step: int | None = None
    """The last that was done."""
    stop_asked: bool = False
    by_rank: Mapping[int, RankSeen] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_rank", {each.rank: each for each in self.ranks})

    @cached_property
    def failed(self) -> tuple[RankSeen, ...]:
        """Dead by no order of ours, the first to die first."""
        dead = [each for each in self.ranks if each.failed]
        return tuple(sorted(dead, key=lambda each: self.now if each.ended is None else each.ended))

    @cached_property
    def living(self) -> tuple[RankSeen, ...]:
        return tuple(each for each in self.ranks if each.status is None)

    def nodes_of(self, ranks: Sequence[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.by_rank[rank].node for rank in ranks if rank in self.by_rank))


def finding(event: Mapping[str, Any]) -> FindingSeen | None:
    """From a line of the event stream; None if it is none, or not one that makes sense."""
    kind, evidence = event.get("kind"), event.get("evidence")
    if event.get("event") != "finding" or not isinstance(kind, str):
        return None
    candidates = evidence.get("candidates") if isinstance(evidence, Mapping) else ()
    step, time = event.get("step"), event.get("t")
    return FindingSeen(
        kind=kind,
        severity=str(event.get("severity", "")),
        message=str(event.get("message", "")),
        step=step if isinstance(step, int) and step >= 0 else None,
        ranks=_ranks(event.get("ranks")),
        candidates=_ranks(candidates),
        time=time if isinstance(time, float) else None,
    )


def _ranks(value: object) -> tuple[int, ...]:
    return tuple(each for each in value if type(each) is int) if isinstance(value, list | tuple) else ()
