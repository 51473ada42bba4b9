"""From what is seen of an attempt to what broke: pure detectors over one frozen snapshot.

Each says what it needs to see before it speaks. What is not proven names no culprit, only suspects; and while
training goes on, nothing that is merely missing (a heartbeat, an answer of a node) ends it: to restart a
healthy job for the sake of a status would cost more than to wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from recovery.blame import Blame
from recovery.diagnose import waitfor
from recovery.diagnose.ranks import named
from recovery.supervise.deaths import death
from recovery.supervise.limits import Overdue, Silence
from recovery.supervise.model import (
    Evidence,
    Fault,
    Proof,
)
from recovery.supervise.snapshot import FindingSeen, NodeSeen, Snapshot


@dataclass(frozen=True, slots=True)
class Reach:
    """When a node that does not answer counts as gone: after so many misses in a row and so many seconds."""

    misses: int = 5
    seconds: float = 60.0
    cut_off_seconds: float = 1800.0
    """After which an attempt is given up whose nodes all are out of reach: they may well train meanwhile."""

    def __post_init__(self) -> None:
        if self.misses < 2 or not self.seconds > 0:
            raise ValueError(f"one miss is never enough: expected 2 or more over some seconds, found {self}")


def detect(snapshot: Snapshot, reach: Reach | None = None) -> tuple[Fault, ...]:
    """What broke, the root first; then what does not end training. Empty while all is well, and for a job
    that was asked to stop, whose ranks may end as they like."""
    if snapshot.stop_asked:
        return ()
    gone = unreachable(snapshot, reach or Reach())
    died = death(snapshot)
    guard = _guards_stop(snapshot)
    silent = () if died is not None else silence(snapshot)
    broken = died is not None or any(fault.ends for fault in (*gone, *silent))
    noted = [*kernel_log(snapshot, broken), *disks(snapshot, broken), *findings(snapshot, broken)]
    if guard is not None:
        # The guard ended it; that the processes are gone follows.
        died = None
        noted = [fault for fault in noted if (fault.kind, fault.ranks) != (guard.kind, guard.ranks)]
    found = [*gone, *noted, *silent, *(each for each in (guard, died) if each is not None)]
    return tuple(sorted(found, key=_weight))


def _weight(fault: Fault) -> tuple[bool, bool, bool, float]:
    """What ends comes first; of that, proof against nodes, then what explains, then what came first."""
    since = math.inf if fault.first_seen is None else fault.first_seen
    return not fault.ends, not fault.convicted, fault.blame is Blame.UNKNOWN, since


# --- nodes -----------------------------------------------------------------------------------------------


def unreachable(snapshot: Snapshot, reach: Reach) -> tuple[Fault, ...]:
    """Nodes that missed several answers in a row, over a stated time; never after one miss.

    Where most nodes are gone at once, the supervisor's own connection is what broke, and nobody is named.
    """
    gone = [each for each in snapshot.nodes if _is_gone(each, snapshot.now, reach)]
    if len(gone) > 1 and (len(gone) == len(snapshot.nodes) or len(gone) > max(2, len(snapshot.nodes) / 2)):
        return (_cut_off(snapshot, gone, reach),)
    return tuple(
        Fault(
            kind="node.unreachable",
            blame=Blame.HARDWARE,
            message=f"{each.node} did not answer {each.misses} times in a row (limit {reach.misses}), for "
            f"{_missing(each, snapshot):.0f} s (limit {reach.seconds:g} s): {each.error or 'no answer'}",
            ranks=_ranks_on(snapshot, (each.node,)),
            nodes=(each.node,),
            proof=Proof.UNREACHABLE,
            step=snapshot.step,
            ends=not _went_on_after(snapshot, each.missing_since),
            first_seen=each.missing_since,
            evidence=(Evidence("reach", each.error or "no answer", each.missing_since, each.node),),
        )
        for each in gone
    )


def _is_gone(node: NodeSeen, now: float, reach: Reach) -> bool:
    since = node.missing_since
    return since is not None and node.misses >= reach.misses and now - since >= reach.seconds


def _missing(node: NodeSeen, snapshot: Snapshot) -> float:
    return snapshot.now - (snapshot.now if node.missing_since is None else node.missing_since)


def _cut_off(snapshot: Snapshot, gone: Sequence[NodeSeen], reach: Reach) -> Fault:
    since = min(each.missing_since or snapshot.now for each in gone)
    return Fault(
        kind="network.cut_off",
        blame=Blame.PLATFORM,
        message=f"{len(gone)} of {len(snapshot.nodes)} nodes stopped answering together, for "
        f"{snapshot.now - since:.0f} s: the way to them is broken, not each of them",
        step=snapshot.step,
        ends=snapshot.now - since >= reach.cut_off_seconds or bool(snapshot.failed),
        first_seen=since,
        evidence=tuple(Evidence("reach", e.error or "no answer", e.missing_since, e.node) for e in gone[:8]),
    )


def _went_on_after(snapshot: Snapshot, since: float | None) -> bool:
    """Did training get on after `since`, as some rank's heartbeat told? Ranks wait for each other, so one
    that gets on shows that all do. The first moments are no sign: what was under way is finished first."""
    if snapshot.failed or since is None:
        return False
    middle = (since + snapshot.now) / 2
    return any(
        each.heard is not None and each.quiet_seconds is not None and each.heard - each.quiet_seconds > middle
        for each in snapshot.living
    )


def kernel_log(snapshot: Snapshot, broken: bool) -> tuple[Fault, ...]:
    """What the kernel logs prove of nodes. Out-of-memory kills are told with the rank that died of them."""
    return tuple(
        Fault(
            kind=line.kind,
            blame=line.blame,
            message=f"{line.node}, kernel log: {line.text:.200}",
            nodes=(line.node,),
            proof=Proof.KERNEL_LOG,
            step=snapshot.step,
            ends=broken,
            first_seen=line.time,
            evidence=(Evidence("kernel_log", line.text, line.time, line.node),),
        )
        for line in {(each.node, each.kind): each for each in reversed(snapshot.kernel)}.values()
        if line.convicts and line.blame is not Blame.USER
    )


def disks(snapshot: Snapshot, broken: bool) -> tuple[Fault, ...]:
    """Disks without room for what the job writes next."""
    return tuple(
        Fault(
            kind="storage.full",
            blame=Blame.PLATFORM,
            message=f"{disk.node}: {disk.path} has {disk.free_bytes} bytes free and needs {disk.least_bytes}",
            step=snapshot.step,
            ends=broken,
            evidence=(
                Evidence("disk", f"{disk.free_bytes} bytes free", snapshot.now, disk.node, file=disk.path),
            ),
        )
        for disk in snapshot.disks
        if disk.free_bytes < disk.least_bytes
    )


# --- silence ---------------------------------------------------------------------------------------------


def silence(snapshot: Snapshot) -> tuple[Fault, ...]:
    """Ranks over their limits: a hang where nobody gets on, a frozen rank where a heart stopped.

    A rank on a node that does not answer is left to `unreachable`: its events may only be on the way.
    """
    lost = {each.node for each in snapshot.nodes if each.misses}
    living = {each.rank: each for each in snapshot.living if each.node not in lost}
    over = [each for each in snapshot.overdue if each.rank in living]
    if not over:
        return ()
    stopped = [each for each in over if each.silence is Silence.HEART]
    about = stopped or over
    fine = [rank for rank in living.values() if rank.rank not in {each.rank for each in over}]
    least = min(each.seconds for each in about)
    getting_on = [r.rank for r in fine if r.quiet_seconds is None or r.quiet_seconds < least / 2]
    ranks = tuple(each.rank for each in about)
    nodes = snapshot.nodes_of(ranks)
    first = max(about, key=lambda each: each.seconds)
    goes_on = f"; {named(getting_on)} get on, so training is left alone" if getting_on else ""
    alone = bool(stopped) and len(ranks) < len(living)
    return (
        Fault(
            kind="rank.frozen" if stopped else "hang",
            blame=Blame.UNKNOWN,
            message=f"{first}{_as_well(about, first)}{goes_on}",
            ranks=ranks if alone else (),
            suspects=nodes if alone or getting_on else (),
            step=snapshot.step,
            ends=not getting_on,
            diagnose=not getting_on,
            first_seen=snapshot.now - first.seconds,
            evidence=tuple(
                Evidence("silence", str(each), snapshot.now, snapshot.by_rank[each.rank].node, each.rank)
                for each in about[:8]
            ),
        ),
    )


def hang_explained(hang: Fault, found: waitfor.Diagnosis, snapshot: Snapshot) -> Fault:
    """The hang with what the wait-for graph says of it.

    Ranks that others wait for and that wait on nobody are named with their nodes, unless they are everywhere.
    Ranks that met with different operations, or in another order, are the program's doing.
    """
    seen = tuple(Evidence("wait_for", line, snapshot.now) for line in found.evidence)
    hang = replace(hang, diagnose=False, evidence=(*hang.evidence, *seen))
    why = found.evidence[0] if found.evidence else found.kind.value
    message = f"{hang.message}; wait-for graph ({found.kind}): {why}"
    nodes = snapshot.nodes_of(found.culprits)
    match found.kind:
        case waitfor.Kind.MISMATCH | waitfor.Kind.CYCLE:
            kind = f"hang.{found.kind}"
            return replace(
                hang, kind=kind, blame=Blame.USER, ranks=found.culprits, place=kind, message=message
            )
        case waitfor.Kind.STOPPED | waitfor.Kind.DEVICE_STALL if nodes and (
            len(nodes) < len({each.node for each in snapshot.ranks}) or len(nodes) == 1
        ):
            stalled = found.kind is waitfor.Kind.DEVICE_STALL
            return replace(
                hang,
                kind=f"hang.{found.kind}",
                blame=Blame.HARDWARE if stalled else Blame.UNKNOWN,
                ranks=found.culprits,
                nodes=nodes,
                suspects=(),
                proof=Proof.WAIT_FOR,
                message=message,
            )
    return replace(hang, suspects=snapshot.nodes_of(found.suspects or found.culprits), message=message)


def _as_well(about: Sequence[Overdue], first: Overdue) -> str:
    others = [each.rank for each in about if each.rank != first.rank]
    return f"; {named(others)} as well" if others else ""


def _ranks_on(snapshot: Snapshot, nodes: Sequence[str]) -> tuple[int, ...]:
    return tuple(each.rank for each in snapshot.ranks if each.node in nodes)


# --- findings --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a kind of finding means for the job. `convicts`: the ranks that it names prove their nodes bad;
    otherwise they are suspects. `alone`: it never ends training by itself."""

    blame: Blame
    convicts: bool = False
    alone: bool = False


MEANINGS = {
    "corruption": Meaning(Blame.UNKNOWN),
    "corruption.persistent": Meaning(Blame.HARDWARE, convicts=True),
    "corruption.transient": Meaning(Blame.HARDWARE, alone=True),
    "corruption.own_doing": Meaning(Blame.USER, alone=True),
    "corruption.not_deterministic": Meaning(Blame.USER, alone=True),
    # Where the first value that is no number was made: by a device, the data or the model alike.
    "finite": Meaning(Blame.UNKNOWN),
    "spike": Meaning(Blame.USER),
    "collapse": Meaning(Blame.USER),
    "slow_rank": Meaning(Blame.HARDWARE, convicts=True, alone=True),
    "jitter": Meaning(Blame.HARDWARE, alone=True),
    "checkpoint.failed": Meaning(Blame.PLATFORM, alone=True),
    "checkpoint.lost": Meaning(Blame.PLATFORM, alone=True),
    "checkpoint.quarantined": Meaning(Blame.PLATFORM, alone=True),
    "checkpoint.gave_up": Meaning(Blame.PLATFORM),
}
"""By kind or by the family before its dot; the longest entry holds (docs/ltf-events.md)."""
OVER = ".over"
"""A finding of this ending takes back the one of the same kind and ranks."""


def findings(snapshot: Snapshot, broken: bool) -> tuple[Fault, ...]:
    """What guards and watches found and did not take back. Kinds without a meaning here are passed over."""
    standing: dict[tuple[str, tuple[int, ...]], FindingSeen] = {}
    for each in snapshot.findings:
        kind = each.kind.removesuffix(OVER)
        standing.pop((kind, each.ranks), None)
        if kind == each.kind:
            standing[kind, each.ranks] = each
    faults = (_of_finding(each, snapshot, broken) for each in standing.values())
    return tuple(fault for fault in faults if fault is not None)


def _of_finding(found: FindingSeen, snapshot: Snapshot, broken: bool, stops: bool = False) -> Fault | None:
    meaning = MEANINGS.get(found.kind) or MEANINGS.get(found.kind.partition(".")[0])
    if meaning is None:
        return None
    nodes = snapshot.nodes_of(found.ranks)
    convicted = nodes if meaning.convicts else ()
    hardware = meaning.blame in (Blame.HARDWARE, Blame.UNKNOWN)
    suspects = () if convicted or not hardware else snapshot.nodes_of(found.ranks or found.candidates)
    return Fault(
        kind=found.kind,
        blame=meaning.blame,
        message=found.message,
        ranks=found.ranks,
        nodes=convicted,
        suspects=suspects,
        proof=Proof.GUARD if convicted or suspects else Proof.NONE,
        place=found.kind if meaning.blame is Blame.USER else None,
        step=found.step,
        ends=stops or (broken and bool(convicted) and not meaning.alone),
        first_seen=found.time,
        evidence=(Evidence("events", f"{found.kind}: {found.message}", found.time),),
    )


def _guards_stop(snapshot: Snapshot) -> Fault | None:
    """Why a guard ended the attempt: the last grave finding, as what it found is what it stopped for."""
    left = [each for each in snapshot.failed if each.exit_reason == "guard"]
    if not left:
        return None
    for found in reversed(snapshot.findings):
        fault = _of_finding(found, snapshot, True, stops=True) if found.severity == "error" else None
        if fault is not None:
            return replace(fault, consequences=len(snapshot.failed))
    first = left[0]
    return Fault(
        kind="guard.stop",
        blame=Blame.UNKNOWN,
        message=first.exit_message or f"a guard stopped {named(each.rank for each in left)}",
        step=snapshot.step,
        first_seen=first.ended,
        consequences=len(snapshot.failed),
        evidence=(Evidence("events", first.exit_message, first.ended, first.node, first.rank),),
    )
