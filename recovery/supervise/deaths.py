"""Which rank died of itself, of what, and which only followed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from recovery.blame import Blame
from recovery.diagnose import exitstatus
from recovery.diagnose.ranks import named
from recovery.supervise.model import (
    Evidence,
    Fault,
    Proof,
)
from recovery.supervise.snapshot import KernelSeen, RankSeen, Snapshot
from recovery.supervise.words import Cause

TOGETHER_SECONDS = 0.5
"""Deaths closer than this have no order: agents poll, and a peer notices a closed socket at once."""
OOM_SECONDS = 120.0
"""Between the kernel's line and the death that it explains: clocks of nodes differ, logs come late."""
HOST_OOM = "memory.host_oom"

BY_SIGNAL = {
    2: Cause("rank.interrupted", Blame.PLATFORM),
    6: Cause("rank.aborted", Blame.UNKNOWN),
    7: Cause("rank.bus_error", Blame.UNKNOWN),
    9: Cause("rank.killed", Blame.UNKNOWN),
    11: Cause("rank.segfault", Blame.UNKNOWN),
    15: Cause("rank.terminated", Blame.PLATFORM),
}
"""Kinds that reports go by. SIGINT and SIGTERM that nobody asked this job for come from outside."""
BY_STATUS = {
    1: Cause("rank.failed", Blame.UNKNOWN),
    2: Cause("configuration.refused", Blame.USER, retryable=False),
    75: Cause("run.locked", Blame.PLATFORM),
}
"""1 says nothing without a traceback. 2 and 75: the trainer's own meanings too (a wrong request; the run's
folder is another process's)."""


def death(snapshot: Snapshot) -> Fault | None:
    """The death that the others followed; None where no rank died of itself."""
    failed = snapshot.failed
    if not failed:
        return None
    first = _first([each for each in failed if not _followed(each)])
    if not first:
        return _nobody(snapshot)
    leader = first[0]
    cause, why = _cause(leader, snapshot.kernel)
    alike = [each for each in first if _cause(each, snapshot.kernel)[0] == cause]
    ranks = tuple(sorted(each.rank for each in alike))
    nodes = snapshot.nodes_of(ranks)
    others = len(failed) - len(alike)
    tail = f"; {others} others followed" if others else ""
    # Ranks may die at several places at once: one of them is enough to tell a repetition by.
    place = leader.words.place if leader.words is not None else None
    return Fault(
        kind=cause.kind,
        blame=cause.blame,
        message=f"{named(ranks)} on {', '.join(nodes)} {why}{tail}",
        ranks=ranks,
        suspects=nodes if cause.blame in (Blame.UNKNOWN, Blame.HARDWARE) else (),
        proof=Proof.EXIT,
        place="out-of-memory killer" if cause.kind == HOST_OOM and place is None else place,
        step=snapshot.step,
        retryable=cause.retryable,
        first_seen=leader.ended,
        consequences=others,
        evidence=tuple(line for each in alike[:8] for line in _evidence(each, snapshot.kernel)),
    )


def _first(own: Sequence[RankSeen]) -> list[RankSeen]:
    """Of those that died together at first, the ones that say most: a signal or a named error outranks a
    plain status 1, which is what a peer has that lost its connection."""
    if not own or own[0].ended is None:
        return list(own[:1])
    start = own[0].ended
    together = [each for each in own if each.ended is not None and each.ended - start <= TOGETHER_SECONDS]
    telling = [each for each in together if each.words is not None or each.status != 1]
    # Who was told to end was told by somebody who saw the failure.
    causing = [each for each in telling if exitstatus.of_popen(each.status or 0).signal != 15]
    return causing or telling or together


def _followed(rank: RankSeen) -> bool:
    if rank.words is not None:
        return rank.words.consequence
    return "lost the other ranks" in rank.exit_message


def _nobody(snapshot: Snapshot) -> Fault:
    """All that died only lost others: look at those that are not among them."""
    failed = snapshot.failed
    left = [each.rank for each in snapshot.ranks if each.status == 0]
    if left:
        return Fault(
            kind="rank.left_early",
            blame=Blame.USER,
            message=f"{named(left)} ended with status 0 while {len(failed)} others still needed them",
            ranks=tuple(left),
            proof=Proof.EXIT,
            step=snapshot.step,
            first_seen=failed[0].ended,
            consequences=len(failed),
            evidence=tuple(line for each in failed[:3] for line in _evidence(each, ())),
        )
    quiet = [each.rank for each in snapshot.living]
    about = f"; {named(quiet)} still run" if quiet else ""
    return Fault(
        kind="rank.lost_peers",
        blame=Blame.UNKNOWN,
        message=f"{named(r.rank for r in failed)} ended for want of others, and none shows a cause{about}",
        suspects=snapshot.nodes_of(quiet),
        proof=Proof.EXIT,
        step=snapshot.step,
        first_seen=failed[0].ended,
        consequences=len(failed),
        evidence=tuple(line for each in failed[:3] for line in _evidence(each, ())),
    )


def _cause(rank: RankSeen, kernel: Sequence[KernelSeen]) -> tuple[Cause, str]:
    """What ended it, and the words for it."""
    if _oom(rank, kernel) is not None:
        return Cause(HOST_OOM, Blame.USER), "was killed by the kernel, which was out of memory"
    if rank.words is not None and rank.words.exception:
        where = f" at {rank.words.place}" if rank.words.place else ""
        return rank.words.cause, f"raised {rank.words.exception}{where}: {rank.words.message:.200}"
    ending = exitstatus.of_popen(rank.status or 0)
    said = exitstatus.explain(ending)
    words = f"ended with {said.name} (status {rank.status}): {said.meaning}"
    known = BY_SIGNAL.get(ending.signal) if ending.signal else BY_STATUS.get(ending.status or 0)
    if known is not None:
        return known, words
    slug = re.sub(r"[^a-z0-9]+", "_", said.name.lower())
    retryable = said.retry is not False or said.blame.value != Blame.USER
    return Cause(f"exit.{slug}", Blame(said.blame.value), retryable), words


def _oom(rank: RankSeen, kernel: Sequence[KernelSeen]) -> KernelSeen | None:
    if exitstatus.of_popen(rank.status or 0).signal != 9 or rank.ended is None:
        return None
    ended = rank.ended
    near = (k for k in kernel if k.kind == HOST_OOM and k.node == rank.node)
    return next((line for line in near if abs(line.time - ended) <= OOM_SECONDS), None)


def _evidence(rank: RankSeen, kernel: Sequence[KernelSeen]) -> list[Evidence]:
    said = exitstatus.explain(exitstatus.of_popen(rank.status or 0))
    lines = [Evidence("exit", f"status {rank.status} ({said.name})", rank.ended, rank.node, rank.rank)]
    if rank.words is not None:
        text = f"{rank.words.exception}: {rank.words.message}" if rank.words.exception else rank.words.message
        lines.append(Evidence("output", text, rank.ended, rank.node, rank.rank))
    elif rank.exit_message:
        lines.append(Evidence("events", rank.exit_message, rank.ended, rank.node, rank.rank))
    oom = _oom(rank, kernel)
    if oom is not None:
        lines.append(Evidence("kernel_log", oom.text, oom.time, oom.node, rank.rank))
    return lines
