"""Ranks that met in the same place and did not do the same: another operation, size or type."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from recovery.diagnose.recording import EVEN, Entry
from recovery.diagnose.stacks import of_frames


@dataclass(frozen=True, slots=True)
class Act:
    """What a rank did at one sequence number of a group."""

    op: str
    elements: int | None
    """Elements brought; None where ranks may rightly bring different numbers."""
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        size = "" if self.elements is None else f" of {self.elements}"
        types = ",".join(dict.fromkeys(self.dtypes))
        return f"{self.op}{size}{' ' + types if types else ''}"


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One sequence number at which a group's ranks did different things, the most numerous first."""

    sequence: int
    acts: tuple[tuple[Act, tuple[int, ...]], ...]
    named: tuple[int, ...]
    """The minority; on a tie everybody."""
    where: tuple[tuple[int, str], ...]
    """A rank of every act and where in the user's code it was."""


def first_disagreement(entries: Iterable[tuple[int, Entry]]) -> Disagreement | None:
    """The lowest sequence number with different acts among (rank, collective entry) pairs of one group."""
    by_seq: dict[int, list[tuple[int, Entry]]] = defaultdict(list)
    for rank, entry in entries:
        by_seq[entry.collective_seq].append((rank, entry))
    for sequence in sorted(by_seq):
        found = _disagreement(sequence, by_seq[sequence])
        if found:
            return found
    return None


def _disagreement(sequence: int, entries: Sequence[tuple[int, Entry]]) -> Disagreement | None:
    # A coalesced launch has one entry for each part under the same number: compare what a rank did in all.
    done: dict[int, list[Act]] = defaultdict(list)
    at: dict[int, Entry] = {}
    for rank, entry in entries:
        done[rank].append(act_of(entry))
        at.setdefault(rank, entry)
    classes: dict[tuple[Act, ...], list[int]] = defaultdict(list)
    for rank, acts in done.items():
        classes[tuple(acts)].append(rank)
    if len(classes) < 2:
        return None
    ordered = sorted(classes.items(), key=lambda c: (-len(c[1]), min(c[1])))
    tie = len(ordered[0][1]) == len(ordered[1][1])
    named = sorted(r for _, ranks in (ordered if tie else ordered[1:]) for r in ranks)
    return Disagreement(
        sequence,
        tuple((acts[0], tuple(sorted(ranks))) for acts, ranks in ordered),
        tuple(named),
        tuple((min(ranks), str(of_frames(at[min(ranks)].frames))) for _, ranks in ordered),
    )


def act_of(entry: Entry) -> Act:
    even = entry.op in EVEN
    return Act(
        entry.op,
        sum(prod(s) for s in entry.input_sizes) if even else None,
        entry.input_dtypes if even else (),
    )
