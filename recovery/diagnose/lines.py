"""A process group as a line: its members, and how far each of them came in it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from recovery.diagnose.mismatch import Disagreement, first_disagreement
from recovery.diagnose.recording import NEEDS_EVERYBODY, Dump, Entry, State


@dataclass(slots=True)
class Line:
    """A group's members and how far each came: the line in which they wait for each other."""

    name: str
    description: str
    members: tuple[int, ...]
    enqueued: dict[int, int] = field(default_factory=dict)
    completed: dict[int, int] = field(default_factory=dict)
    unfinished: dict[int, list[Entry]] = field(default_factory=dict)
    entries: list[tuple[int, Entry]] = field(default_factory=list)

    def disagreement(self) -> Disagreement | None:
        """Only where someone hangs: what completed everywhere cannot have been wrong."""
        hanging = {e.collective_seq for entries in self.unfinished.values() for e in entries}
        return first_disagreement((r, e) for r, e in self.entries if e.collective_seq in hanging)

    def title(self) -> str:
        return title(self.name, self.description)


def title(name: str, description: str) -> str:
    """A group as a person knows it: its description where the program gave one."""
    return f"{name} ({description})" if description and description != "undefined" else name


def without_false_ends(dumps: Mapping[int, Dump], lines: Sequence[Line]) -> dict[int, Dump]:
    """Take back what Gloo calls ended but cannot have been: it says so of failed operations too.

    An operation that needs everybody has not been done while a member has not entered it. Only a member whose
    dump shows how far it came (its entries in that group, or the recording since the start) counts.
    """
    corrected = dict(dumps)
    for line in lines:
        shown = [r for r in line.members if r in dumps and (line.name in dumps[r].progress or dumps[r].whole)]
        least = min((line.enqueued.get(r, 0) for r in shown), default=0)
        false = {
            rank
            for rank, e in line.entries
            if e.collective_seq > least and e.state is State.COMPLETED and _may_be_false(e)
        }
        for rank in false:
            dump = corrected[rank]
            entries = tuple(
                replace(e, state=State.SCHEDULED)
                if e.group == line.name and e.collective_seq > least and _may_be_false(e)
                else e
                for e in dump.entries
            )
            came = dump.progress[line.name]
            progress = {**dump.progress, line.name: replace(came, completed=min(came.completed, least))}
            corrected[rank] = replace(dump, entries=entries, progress=progress)
    return corrected


def _may_be_false(entry: Entry) -> bool:
    return entry.backend == "gloo" and not entry.is_p2p and entry.op in NEEDS_EVERYBODY


def lines_of(dumps: Mapping[int, Dump], ranks: set[int], given: Mapping[str, Sequence[int]]) -> list[Line]:
    """Every group once, with its members resolved as ``waitfor.diagnose`` states."""
    told: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    users: dict[str, set[int]] = defaultdict(set)
    for rank, dump in dumps.items():
        for name, group in dump.groups.items():
            users[name].add(rank)
            if group.ranks:
                told[name].add(group.ranks)
    everybody = tuple(sorted(ranks))
    lines: dict[tuple[str, tuple[int, ...]], Line] = {}
    for rank, dump in dumps.items():
        for name, group in dump.groups.items():
            members = group.ranks
            if members is None and len(told[name]) == 1:
                members = next(iter(told[name]))
            elif members is None and name in given:
                members = tuple(given[name])
            elif members is None:
                default = name == "0" or group.description == "default_pg"
                members = everybody if default else tuple(sorted(users[name]))
            key = (name, members)
            if key not in lines:
                lines[key] = Line(name, group.description, members)
            _enter(lines[key], rank, dump)
    for line in lines.values():
        _settle_unknown(line, dumps)
    return list(lines.values())


def _enter(line: Line, rank: int, dump: Dump) -> None:
    progress = dump.progress.get(line.name)
    line.enqueued[rank] = progress.enqueued if progress else 0
    line.completed[rank] = progress.completed if progress else 0
    # What is kept may begin in the middle of a coalesced launch: half of it is nothing to compare.
    oldest = dump.entries[0] if dump.entries else None
    cut = (oldest.group, oldest.collective_seq) if oldest and oldest.state is State.COMPLETED else None
    for entry in dump.entries:
        if entry.group == line.name and not entry.is_p2p:
            if (entry.group, entry.collective_seq) != cut:
                line.entries.append((rank, entry))
            if entry.state is not State.COMPLETED:
                line.unfinished.setdefault(rank, []).append(entry)


def _settle_unknown(line: Line, dumps: Mapping[int, Dump]) -> None:
    """A dump of active operations alone need not say how far its rank came in a group where it has none.

    Where several hang and few are silent, the silent have not entered; where one hangs and all the others are
    silent, they have gone past it.
    """
    silent = [
        r
        for r in line.members
        if r in dumps
        and r not in line.unfinished
        and line.name not in dumps[r].progress
        and not dumps[r].whole
    ]
    if len(line.unfinished) == 1 and len(silent) >= 2 and len(silent) == len(line.members) - 1:
        last = max(e.collective_seq for entries in line.unfinished.values() for e in entries)
        for rank in silent:
            line.enqueued[rank] = line.completed[rank] = last
