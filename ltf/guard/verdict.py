"""What repeated runs of one step say about the hardware: decisions over digests, no computation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations
from typing import TypeAlias

from ltf.findings import Finding, Json, Severity
from ltf.guard.digest import Difference
from ltf.guard.point import Phase, Point, maker


class Kind(StrEnum):
    """TRANSIENT: a device computed the same thing differently once. PERSISTENT: a device computes it
    otherwise than its partner, or differently each time. OWN_DOING: suspicious, yet every device agrees.
    NOT_DETERMINISTIC: results vary where nothing is broken, so bits prove nothing. UNDETERMINED: the evidence
    does not decide.
    """

    CLEAN = "clean"
    TRANSIENT = "transient"
    PERSISTENT = "persistent"
    UNDETERMINED = "undetermined"
    OWN_DOING = "own_doing"
    NOT_DETERMINISTIC = "not_deterministic"


Repeats: TypeAlias = Mapping[tuple[int, int], Sequence[Difference]]
"""For each pair of runs of the same batches (0 is the original), what differs between them, by rank."""


@dataclass(frozen=True)
class Verdict:
    """`ranks`: proven culprits. `candidates`: one of these is it, or some; to be probed. `point`: the
    earliest difference by cause and effect, if any."""

    kind: Kind
    message: str
    ranks: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()
    point: Point | None = None
    evidence: Mapping[str, Json] = field(default_factory=dict)

    def finding(self, step: int) -> Finding | None:
        """None if all was well."""
        if self.kind is Kind.CLEAN:
            return None
        hardware = self.kind in (Kind.TRANSIENT, Kind.PERSISTENT)
        evidence: dict[str, Json] = {**self.evidence, "candidates": list(self.candidates)}
        severity = Severity.ERROR if hardware else Severity.WARNING
        return Finding(f"corruption.{self.kind}", severity, step, self.message, self.ranks, evidence)


@dataclass(frozen=True)
class Setting:
    """What all comparisons share. `units`: each rank's unit (ranks that exchange activations), from 0.

    `deterministic`: torch was asked for kernels that repeat. `suspected`: something led to the replay;
    `suspects`: the ranks it named. `layers`: how many the model has.
    """

    units: Sequence[int]
    layers: int
    deterministic: bool = True
    suspected: bool = False
    suspects: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(set(self.units))

    def ranks(self, unit: int) -> list[int]:
        """In order, which is the order of their places in the unit."""
        return [rank for rank, of in enumerate(self.units) if of == unit % self.count]


def judge(repeats: Repeats, partner: Sequence[Difference | None] | None, setting: Setting) -> Verdict:
    """`partner`: by rank, its result with the next unit's batches against that unit's own.

    None for a rank whose device is of another kind than the partner's, whose bits may differ without fault;
    None for all if there was no such run.
    """
    again = repeats[0, 1]
    if any(d.differing for d in again):
        return _unrepeated(repeats, setting)
    if partner is None or all(d is None for d in partner):
        return _without_partner(setting)
    edges = _edges(partner, setting)
    if not edges:
        return _agreed(setting)
    return _disagreed(edges, setting)


def clean_pair(repeats: Repeats) -> tuple[int, int] | None:
    """Two runs with the same bits on every rank."""
    return next(
        (pair for pair, by_rank in sorted(repeats.items()) if not any(d.differing for d in by_rank)), None
    )


def _unrepeated(repeats: Repeats, setting: Setting) -> Verdict:
    evidence: dict[str, Json] = {
        "differences": {f"{a}-{b}": [_described(d) for d in by_rank] for (a, b), by_rank in repeats.items()}
    }
    if not setting.deterministic:
        message = (
            "a replay gave other bits, but deterministic kernels are not asked for (run.deterministic): "
            "this says nothing about the hardware"
        )
        return Verdict(Kind.NOT_DETERMINISTIC, message, evidence=evidence)
    pair = clean_pair(repeats)
    if pair is None:
        return _never_alike(repeats, setting, evidence)
    wrong = sorted({run for other in repeats for run in other if any(_between(repeats, pair[0], run))})
    origins = {run: _origins(_between(repeats, pair[0], run), setting) for run in wrong}
    counts: dict[int, int] = {}
    for found in origins.values():
        for rank in {rank for _, ranks in found for rank in ranks}:
            counts[rank] = counts.get(rank, 0) + 1
    first = min((point for found in origins.values() for point, _ in found), key=lambda point: point.order)
    evidence |= {"wrong_runs": list(wrong), "clean_runs": list(pair)}
    if first.phase is Phase.REDUCED:
        message = (
            f"{maker(first, setting.layers)} gave other bits in run {wrong[0]} from the same "
            "gradients of all ranks: network, or the reduction itself; no rank is named"
        )
        return Verdict(
            Kind.UNDETERMINED, message, candidates=tuple(sorted(counts)), point=first, evidence=evidence
        )
    ranks = tuple(sorted(counts))
    often = [rank for rank, times in counts.items() if times > 1]
    kind = Kind.PERSISTENT if often else Kind.TRANSIENT
    when = "the step itself" if wrong[0] == 0 else "its replay"
    message = (
        f"{_ranks(ranks)} computed {maker(first, setting.layers)} differently in {when} than in two other "
        f"runs of the same micro-batches ({_where(first)}): "
        + ("a device that fails again and again" if often else "a transient fault")
    )
    return Verdict(kind, message, tuple(often) or ranks, (), first, evidence)


def _never_alike(repeats: Repeats, setting: Setting, evidence: dict[str, Json]) -> Verdict:
    runs = 1 + max(b for _, b in repeats)
    own = [_own(by_rank) for by_rank in repeats.values()]
    always = [r for r in range(len(setting.units)) if all(by_rank[r].differing for by_rank in own)]
    affected = {setting.units[rank] for rank in always}
    origins = _origins([d if r in always else _SAME for r, d in enumerate(repeats[0, 1])], setting)
    first = min((point for point, _ in origins), key=lambda point: point.order, default=None)
    ranks = tuple(sorted(rank for _, named in origins for rank in named))
    if first is not None and first.phase is not Phase.REDUCED and 0 < len(affected) < setting.count:
        message = (
            f"{_ranks(ranks)} computed {maker(first, setting.layers)} differently in each of {runs} runs of "
            "the same micro-batches while other ranks repeated theirs: a persistent fault"
        )
        return Verdict(Kind.PERSISTENT, message, ranks, (), first, evidence)
    if len(affected) == setting.count > 1:
        message = (
            f"no two of {runs} runs gave the same bits, on any unit of ranks: some kernel is not "
            "deterministic although torch was asked for it; replays prove nothing here"
        )
        return Verdict(Kind.NOT_DETERMINISTIC, message, point=first, evidence=evidence)
    message = f"no two of {runs} runs gave the same bits; nothing tells a fault from a kernel that varies"
    return Verdict(Kind.UNDETERMINED, message, (), ranks, first, evidence)


def _without_partner(setting: Setting) -> Verdict:
    if setting.count == 1:
        why = "with one unit of ranks there is no partner to compare with"
    else:
        why = "there was no partner of the same kind of device to compare with"
    evidence: dict[str, Json] = {"partner_test": False}
    if not setting.suspected:
        return Verdict(Kind.CLEAN, f"the replay gave the same bits; {why}", evidence=evidence)
    message = (
        f"the replay gave the same bits, so no transient fault; {why}: the model's own doing and a "
        "persistent fault cannot be told apart"
    )
    return Verdict(Kind.UNDETERMINED, message, (), setting.suspects, evidence=evidence)


def _agreed(setting: Setting) -> Verdict:
    if not setting.suspected:
        return Verdict(Kind.CLEAN, "replay and partners gave the same bits", evidence={"partner_test": True})
    message = (
        "replay and partners gave the same bits: what was suspected is the model's or the data's own doing"
    )
    return Verdict(Kind.OWN_DOING, message, evidence={"partner_test": True})


def _disagreed(edges: Mapping[int, tuple[Point, tuple[int, ...]]], setting: Setting) -> Verdict:
    """An edge u joins unit u and the next: they disagree on the next one's batches."""
    count = setting.count
    first = min((point for point, _ in edges.values()), key=lambda point: point.order)
    places = sorted(
        {place for point, places in edges.values() if point.place == first.place for place in places}
    )
    evidence: dict[str, Json] = {
        "partner_test": True,
        "disagreeing_units": [[unit, (unit + 1) % count] for unit in sorted(edges)],
    }
    what = f"{maker(first, setting.layers)} ({_where(first)})"

    def at(units: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(setting.ranks(unit)[place] for unit in units for place in places))

    if count > 2 and len(edges) < count and (named := _explained(edges.keys(), count)) is not None:
        ranks = at(named)
        message = (
            f"{_ranks(ranks)} computed {what} otherwise than the partners on both sides, which agree with "
            "all others, and did so again: a persistent fault"
        )
        return Verdict(Kind.PERSISTENT, message, ranks, (), first, evidence)
    involved = sorted({u % count for edge in edges for u in (edge, edge + 1)})
    candidates = at(involved)
    suspects = tuple(rank for rank in candidates if rank in setting.suspects)
    if len(suspects) == 1:
        message = (
            f"{_ranks(suspects)} computed {what} otherwise than a partner, again and again, and is the one "
            "that was suspected: a persistent fault"
        )
        return Verdict(Kind.PERSISTENT, message, suspects, candidates, first, evidence)
    message = (
        f"{_ranks(candidates)} disagree on {what}, each with the same bits again: one has a persistent "
        "fault, and the evidence does not say which; probe them"
    )
    return Verdict(Kind.PERSISTENT, message, (), candidates, first, evidence)


def _explained(edges: Iterable[int], count: int) -> list[int] | None:
    """Units that disagree with both neighbours and so explain every edge; None if some edge stays open."""
    bad = set(edges)
    starts = [edge for edge in bad if (edge - 1) % count not in bad]
    named = []
    for start in starts:
        length = 1
        while (start + length) % count in bad:
            length += 1
        if length != 2:
            return None
        named.append((start + 1) % count)
    return sorted(named)


_SAME = Difference(None, 0, 0)


def _between(repeats: Repeats, a: int, b: int) -> Sequence[Difference]:
    """By rank; nothing where the runs are the same or agree."""
    if a == b:
        return []
    by_rank = repeats[min(a, b), max(a, b)]
    return by_rank if any(d.differing for d in by_rank) else []


def _origins(by_rank: Sequence[Difference], setting: Setting) -> list[tuple[Point, tuple[int, ...]]]:
    """Of each unit that has any, the earliest difference and the ranks that show it."""
    found = []
    by_rank = _own(by_rank)
    for unit in range(setting.count):
        points = [(p, r) for r in setting.ranks(unit) if (p := by_rank[r].first) is not None]
        if points:
            first = min((point for point, _ in points), key=lambda point: point.order)
            found.append((first, tuple(rank for point, rank in points if point == first)))
    return found


def _own(by_rank: Sequence[Difference]) -> Sequence[Difference]:
    """Without what a rank only got from the reduction, unless no rank differs before it."""
    if all(d.first is None or d.first.phase is Phase.REDUCED for d in by_rank):
        return by_rank
    return [_SAME if d.first is not None and d.first.phase is Phase.REDUCED else d for d in by_rank]


def _edges(
    partner: Sequence[Difference | None], setting: Setting
) -> dict[int, tuple[Point, tuple[int, ...]]]:
    """Units that disagree with the next one: the earliest point, and which places in the unit show it."""
    known = [_SAME if d is None else d for d in partner]
    edges = {}
    for point, ranks in _origins(known, setting):
        unit = setting.units[ranks[0]]
        members = setting.ranks(unit)
        edges[unit] = point, tuple(members.index(rank) for rank in ranks)
    return edges


def pairs(runs: int) -> list[tuple[int, int]]:
    """All pairs of so many runs."""
    return list(combinations(range(runs), 2))


def _where(point: Point) -> str:
    return f"{point.phase.name.lower()}, micro-batch {point.micro_batch}"


def _described(difference: Difference) -> Json:
    first = difference.first
    return {
        "differing": difference.differing,
        "compared": difference.compared,
        "first": None
        if first is None
        else {
            "phase": first.phase.name.lower(),
            "micro_batch": first.micro_batch,
            "layer": first.layer,
            "segment": first.segment.name.lower(),
        },
    }


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)
