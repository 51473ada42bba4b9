"""What one rank recorded of its collectives: the model that the dump's reader fills and the graph reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from recovery.diagnose.stacks import Frame

COMPLETED_KEPT = 64
"""Completed entries kept of each rank: enough to show what a rank did last."""

NEEDS_EVERYBODY = frozenset(
    [
        "_all_gather_base",
        "_reduce_scatter_base",
        "all_gather",
        "all_gather_single",
        "all_reduce",
        "all_reduce_barrier",
        "allreduce_coalesced",
        "barrier",
        "reduce_scatter",
        "reduce_scatter_single",
    ]
)
"""No rank can finish these before every rank has given its part (a broadcast's root can)."""

EVEN = NEEDS_EVERYBODY | {"_broadcast_oop", "_reduce_oop", "broadcast", "reduce"}
"""To these every rank must bring as many elements; in the others sizes may differ rightly."""


class State(StrEnum):
    """How far an operation came on this rank."""

    SCHEDULED = "scheduled"
    STARTED = "started"
    COMPLETED = "completed"


@dataclass(frozen=True, slots=True)
class Group:
    """A process group. ``ranks`` are global ranks in group order; None where the dump does not say."""

    name: str
    description: str
    ranks: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation as this rank recorded it. Times are nanoseconds since 1970 on the rank's own clock."""

    record: int
    group: str
    op: str
    backend: str
    state: State
    retired: bool
    collective_seq: int
    p2p_seq: int
    op_id: int
    is_p2p: bool
    peers: tuple[int, int] | None
    """(source, destination) of a send or receive, as ranks within the group."""
    input_sizes: tuple[tuple[int, ...], ...]
    output_sizes: tuple[tuple[int, ...], ...]
    input_dtypes: tuple[str, ...]
    output_dtypes: tuple[str, ...]
    created_ns: int
    started_ns: int | None
    completed_ns: int | None
    timeout_ms: int | None
    frames: tuple[Frame, ...]
    """Innermost first."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank came in one group, in collective sequence numbers (0: none)."""

    enqueued: int
    completed: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """All sends, or all receives, of one ordered pair of group ranks that are in the dump."""

    seen: int
    last_completed_created_ns: int
    """When the newest completed one was created; 0 where none is."""


@dataclass(frozen=True, slots=True)
class Dump:
    """What one rank recorded."""

    rank: int
    version: str
    groups: Mapping[str, Group]
    entries: tuple[Entry, ...]
    """Oldest first: every unfinished one, and the newest ``COMPLETED_KEPT`` of the completed."""
    progress: Mapping[str, Progress]
    exchanges: Mapping[tuple[str, str, int, int], Exchange]
    """By group, ``send`` or ``recv``, source and destination within the group."""
    whole: bool
    """The recording reaches back to the first operation, so that counts are counts since the start."""

    @property
    def unfinished(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.state is not State.COMPLETED)
