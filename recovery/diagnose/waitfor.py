"""Who keeps the others waiting: a graph over what every rank has enqueued and finished.

Rank r waits on q when r has an unfinished operation that q has not come to. The guilty are waited on and wait
on nobody. The edges are never listed one by one: a group's ranks are ordered by how far they came, so that
the work grows with the entries and not with the square of the ranks.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from recovery.diagnose.lines import Line, lines_of, title, without_false_ends
from recovery.diagnose.mismatch import Disagreement
from recovery.diagnose.ranks import named
from recovery.diagnose.recording import NEEDS_EVERYBODY, Dump, Entry
from recovery.diagnose.stacks import of_frames


class Kind(StrEnum):
    """What kept the job from going on."""

    STOPPED = "stopped"
    """The culprits never entered an operation in which others wait, and wait on nobody themselves."""
    DEVICE_STALL = "device_stall"
    """Peers finished an operation that needs everyone; the culprits entered it and did not finish it."""
    MISMATCH = "mismatch"
    """Ranks met with different operations, sizes or types; the minority is named, on a tie everybody."""
    MISSING = "missing"
    """Others wait for ranks that left no dump. They may be dead, or only their dump may be lost."""
    CYCLE = "cycle"
    """Ranks wait on each other in a ring: they take operations of several groups in different orders."""
    TOGETHER = "together"
    """Everybody entered and nobody finishes: a link or a device, to be probed; no rank stands out."""
    NOTHING = "nothing"
    """No rank has an unfinished operation."""


@dataclass(frozen=True, slots=True)
class Wait:
    """All waits in one operation of one group: everyone in ``waiting`` waits on everyone in ``lacking``."""

    group: str
    description: str
    op: str
    sequence: int
    waiting: tuple[int, ...]
    lacking: tuple[int, ...]

    def __str__(self) -> str:
        what = f"{self.op} #{self.sequence} of group {title(self.group, self.description)}"
        return f"{named(self.waiting)} in {what}, for {named(self.lacking)}"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The culprits and the proof. ``culprits`` is empty when no rank can be singled out."""

    kind: Kind
    culprits: tuple[int, ...]
    suspects: tuple[int, ...]
    """Ranks to look at that nothing proves guilty: without a dump, in the ring, or stalled together."""
    groups: tuple[str, ...]
    edges: tuple[Wait, ...]
    """Most waiting ranks first, ``MAX_EDGES`` at most."""
    evidence: tuple[str, ...]


MAX_EDGES = 20


def diagnose(
    dumps: Mapping[int, Dump],
    *,
    world_size: int | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> Diagnosis:
    """Combine the dumps of one attempt, taken after it had stopped moving.

    ``groups`` gives global ranks of groups by name where the caller knows them and the dumps do not (Gloo);
    otherwise such a group is taken to be the ranks that used it, and the default group everybody.
    """
    ranks = set(dumps) | set(range(world_size or 0))
    for dump in dumps.values():
        ranks.update(r for g in dump.groups.values() for r in g.ranks or ())
    lines = lines_of(dumps, ranks, groups or {})
    corrected = without_false_ends(dumps, lines)
    if any(corrected[r] is not dumps[r] for r in dumps):
        dumps, lines = corrected, lines_of(corrected, ranks, groups or {})
    missing = ranks - set(dumps)
    disagreements = [(line, found) for line in lines if (found := line.disagreement())]
    if disagreements:
        return _of_mismatch(disagreements, missing)
    graph = _Graph(dumps, lines)
    edges = graph.summary()
    shown = tuple(dict.fromkeys(w.group for w in edges))
    guilty = graph.guilty()
    proven = guilty - missing
    if proven:
        kind = Kind.DEVICE_STALL if proven & set(graph.stalled) else Kind.STOPPED
        evidence = [text for rank in sorted(proven)[:MAX_EDGES] for text in graph.proof(rank)]
        return _result(kind, proven, missing, shown, edges, [*evidence, *_without_dump(missing)])
    if guilty:
        return _result(Kind.MISSING, guilty, missing, shown, edges, _without_dump(missing))
    if graph.outgoing:
        ring = graph.ring()
        return _result(Kind.CYCLE, (), {*ring, *missing}, shown, edges, graph.ring_proof(ring))
    stuck = {r for r, dump in dumps.items() if dump.unfinished}
    if stuck:
        names = tuple(line.name for line in lines if line.unfinished)
        texts = [_standing_in(r, dumps[r].unfinished[0]) for r in sorted(stuck)[:5]]
        return _result(Kind.TOGETHER, (), stuck, names, (), texts)
    return _result(Kind.NOTHING, (), missing, (), (), _without_dump(missing))


def _result(
    kind: Kind,
    culprits: set[int] | tuple[()],
    suspects: set[int],
    groups: tuple[str, ...],
    edges: tuple[Wait, ...],
    evidence: Sequence[str],
) -> Diagnosis:
    waits = [f"waiting: {wait}" for wait in edges[:5]]
    left = tuple(sorted(suspects - set(culprits)))
    return Diagnosis(kind, tuple(sorted(culprits)), left, groups, edges, (*evidence, *waits))


# --- evidence ------------------------------------------------------------------------------------------


def _of_mismatch(found: Sequence[tuple[Line, Disagreement]], missing: set[int]) -> Diagnosis:
    evidence: list[str] = []
    edges: list[Wait] = []
    culprits: set[int] = set()
    for line, wrong in found:
        culprits.update(wrong.named)
        where = dict(wrong.where)
        evidence += [
            f"#{wrong.sequence} of group {line.title()}: {named(ranks)} did {act}, {where[min(ranks)]}"
            for act, ranks in wrong.acts
        ]
        most = wrong.acts[0]
        edges.append(Wait(line.name, line.description, most[0].op, wrong.sequence, most[1], wrong.named))
    names = tuple(line.name for line, _ in found)
    evidence += _without_dump(missing)
    return _result(Kind.MISMATCH, culprits, missing, names, tuple(edges[:MAX_EDGES]), evidence)


def _without_dump(missing: set[int]) -> list[str]:
    return [f"no dump of {named(missing)}"] if missing else []


def _standing_in(rank: int, entry: Entry) -> str:
    number = entry.p2p_seq if entry.is_p2p else entry.collective_seq
    place = of_frames(entry.frames)
    where = f", at {place.user}" if place.user else ""
    return f"rank {rank} is in {entry.op} #{number} of group {entry.group} ({entry.state}){where}"


# --- the graph -----------------------------------------------------------------------------------------


class _Graph:
    """Edges by group and class instead of by pair, and one example of each rank's edges for rings."""

    def __init__(self, dumps: Mapping[int, Dump], lines: Sequence[Line]) -> None:
        self.dumps, self.lines = dumps, lines
        self.outgoing: dict[int, int] = {}
        """Of every rank that waits, one rank that it waits on."""
        self.waited_on: dict[int, tuple[Wait, Entry | None]] = {}
        self.stalled: dict[int, tuple[Line, Entry, int]] = {}
        self.waits: list[Wait] = []
        for line in lines:
            self._find_stalls(line)
        for line in lines:
            self._not_entered(line)
        self._queued_behind()
        self._exchanges()

    def guilty(self) -> set[int]:
        """Waited on and waiting on nobody, and whoever could not finish what its peers finished."""
        return {r for r in self.waited_on if r not in self.outgoing} | set(self.stalled)

    def summary(self) -> tuple[Wait, ...]:
        ordered = sorted(self.waits, key=lambda w: (-len(w.waiting), w.group, w.sequence, w.lacking))
        return tuple(ordered[:MAX_EDGES])

    def ring(self) -> tuple[int, ...]:
        """Ranks that wait on each other in turn: whoever is waited on waits, so following ends in one."""
        seen: dict[int, int] = {}
        rank = min(self.outgoing)
        while rank not in seen:
            seen[rank] = len(seen)
            rank = self.outgoing[rank]
        return tuple(r for r, at in seen.items() if at >= seen[rank])

    def ring_proof(self, ring: Sequence[int]) -> list[str]:
        turns = [f"rank {r} waits on rank {self.outgoing[r]}" for r in ring[:MAX_EDGES]]
        return [*turns, *(_standing_in(r, self.dumps[r].unfinished[0]) for r in ring[:5])]

    def proof(self, rank: int) -> Iterator[str]:
        """The lines that show a culprit with a dump for one."""
        if rank in self.stalled:
            line, entry, peer = self.stalled[rank]
            what = f"{entry.op} #{entry.collective_seq} of group {line.title()}"
            yield f"rank {rank} has not finished {what}, which rank {peer} finished with its help"
        elif rank in self.waited_on:
            wait, waiting = self.waited_on[rank]
            what = f"{wait.op} #{wait.sequence} of group {title(wait.group, wait.description)}"
            yield f"rank {rank} has not entered {what}; waiting there: {named(wait.waiting)}"
            place = of_frames(waiting.frames) if waiting else None
            if place and place.user:
                yield f"rank {wait.waiting[0]} waits {place}"
        entries = self.dumps[rank].entries
        if not entries:
            yield f"rank {rank} has nothing unfinished in its dump"
            return
        last = entries[-1]
        number = last.p2p_seq if last.is_p2p else last.collective_seq
        place = of_frames(last.frames)
        yield (
            f"rank {rank} enqueued last {last.op} #{number} of group {last.group} ({last.state})"
            + (f", {place}" if place.user else "")
        )

    def _edge(self, waiting: int, on: int) -> None:
        # Whoever cannot finish what its peers finished waits on nobody: its own device holds it.
        if waiting not in self.stalled:
            self.outgoing.setdefault(waiting, on)

    def _wait(
        self, line: Line, entry: Entry, number: int, waiting: Sequence[int], lacking: Sequence[int]
    ) -> None:
        for rank in waiting:
            self._edge(rank, lacking[0])
        wait = Wait(
            line.name, line.description, entry.op, number, tuple(sorted(waiting)), tuple(sorted(lacking))
        )
        for rank in lacking:
            self.waited_on.setdefault(rank, (wait, entry))
        if len(self.waits) < 50 * MAX_EDGES:
            self.waits.append(wait)

    def _find_stalls(self, line: Line) -> None:
        farthest = max(line.completed.values(), default=0)
        for rank, entries in line.unfinished.items():
            for entry in entries:
                # Gloo works on the host: there a busy machine looks the same, and no device hangs.
                if entry.backend == "gloo":
                    continue
                if entry.collective_seq <= farthest and entry.op in NEEDS_EVERYBODY:
                    peer = next(r for r, seq in line.completed.items() if seq == farthest)
                    if rank not in self.stalled or entry.record < self.stalled[rank][1].record:
                        self.stalled[rank] = (line, entry, peer)
                    break

    def _not_entered(self, line: Line) -> None:
        """Members by how far they came; whoever has an unfinished operation beyond that waits on them."""
        newest = {r: max(e.collective_seq for e in entries) for r, entries in line.unfinished.items()}
        behind: dict[int, list[int]] = defaultdict(list)
        top = max(newest.values(), default=-1)
        for rank in line.members:
            # A rank without a dump is not known to have come to anything.
            reached = line.enqueued.get(rank, 0) if rank in self.dumps else -1
            if reached < top:
                behind[reached].append(rank)
        for reached in sorted(behind):
            waiting = [r for r in newest if newest[r] > reached]
            beyond = (e for r in waiting for e in line.unfinished[r] if e.collective_seq > reached)
            first = min(beyond, key=lambda e: e.collective_seq)
            self._wait(line, first, first.collective_seq, waiting, behind[reached])

    def _queued_behind(self) -> None:
        """A member may have enqueued the operation and still be held by one before it."""
        held: dict[tuple[int, int], list[int]] = {}
        oldest = {r: d.unfinished[0].record for r, d in self.dumps.items() if d.unfinished}
        for at, line in enumerate(self.lines):
            for rank, entries in line.unfinished.items():
                for entry in entries:
                    if oldest[rank] < entry.record:
                        held.setdefault((at, entry.collective_seq), []).append(rank)
        for at, line in enumerate(self.lines):
            fronts: dict[int, list[int]] = defaultdict(list)
            for rank, entries in line.unfinished.items():
                if entries[0].record == oldest[rank] and (at, entries[0].collective_seq) in held:
                    fronts[entries[0].collective_seq].append(rank)
            for sequence, waiting in fronts.items():
                entry = line.unfinished[waiting[0]][0]
                self._wait(line, entry, sequence, waiting, held[at, sequence])

    def _exchanges(self) -> None:
        """Sends and receives: the peer lacks the counterpart, or has it behind something unfinished."""
        by_member = {(r, line.name): line for line in self.lines for r in line.members}
        for rank, dump in self.dumps.items():
            pending: dict[tuple[str, str, int, int], list[Entry]] = defaultdict(list)
            for entry in dump.unfinished:
                if entry.is_p2p and entry.peers and entry.op in _COUNTERPART:
                    pending[(entry.group, entry.op, *entry.peers)].append(entry)
            for key, entries in pending.items():
                line = by_member.get((rank, key[0]))
                peer = _peer(line, key) if line else None
                if line is None or peer is None:
                    continue
                held = self._lacking(rank, peer, key, entries)
                if held is not None:
                    self._wait(line, held, held.p2p_seq, [rank], [peer])

    def _lacking(
        self, rank: int, peer: int, key: tuple[str, str, int, int], entries: Sequence[Entry]
    ) -> Entry | None:
        """The first of a rank's open sends (or receives) to a peer that the peer is not at."""
        other = self.dumps.get(peer)
        if other is None:
            return entries[0]
        mine = self.dumps[rank]
        counterpart = (key[0], _COUNTERPART[key[1]], key[2], key[3])
        answer = other.exchanges.get(counterpart)
        open_there = [e for e in other.unfinished if e.peers and (e.group, e.op, *e.peers) == counterpart]
        if mine.whole and other.whole:
            before = mine.exchanges[key].seen - len(entries)
            matched = (answer.seen if answer else 0) - before
        else:
            # Counts since the start are lost: an answer that is newer than the question was to it.
            newer = answer is not None and answer.last_completed_created_ns >= entries[0].created_ns
            matched = len(entries) if newer else len(open_there)
        if matched < len(entries):
            return entries[max(matched, 0)]
        behind = open_there and other.unfinished[0].record < open_there[0].record
        return entries[0] if behind else None


_COUNTERPART = {"send": "recv", "recv": "send"}


def _peer(line: Line, key: tuple[str, str, int, int]) -> int | None:
    """The other side's global rank; groups number their members from 0."""
    within = key[3] if key[1] == "send" else key[2]
    return line.members[within] if within < len(line.members) else None
