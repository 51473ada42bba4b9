"""Which pairs of nodes to measure, and what their results say: the guilty node, or the path between
good ones. Pure.

All pairs are covered by the circle method in n - 1 rounds. A screen needs far fewer: some rounds of
matching by distance, then the members of failed pairs again with partners that are known to be good.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]
Round = tuple[Pair, ...]
"""Pairs that are measured at the same time: no node is in two of them."""

FAILURES_OF_A_NODE = 2
"""Failed pairs, each with another good partner, that accuse a node itself."""


@dataclass(frozen=True, slots=True)
class PairResult:
    pair: Pair
    passed: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    nodes: tuple[str, ...]
    """Failed with every partner, at least two of them good."""
    paths: tuple[Pair, ...]
    """Failed, though both ends passed with others."""
    unresolved: tuple[Pair, ...]
    """Failed, and more has to be measured to tell why."""


def all_pairs(nodes: Sequence[str]) -> list[Round]:
    """Every pair once, in n - 1 rounds (n if n is odd): one node stands still, the others turn around it."""
    ring: list[str | None] = list(nodes)
    if len(ring) % 2:
        ring.append(None)
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        facing = zip(ring[:half], reversed(ring[half:]), strict=True)
        rounds.append(tuple((a, b) for a, b in facing if a is not None and b is not None))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds if len(nodes) > 1 else []


def screen(nodes: Sequence[str], place: Mapping[str, Sequence[str]]) -> list[Round]:
    """One round for each distance that occurs, from the nearest; each is a matching as large as that
    distance allows.

    `place`: node -> the switches above it, from the outermost in, e.g. ``("core", "pod2", "leaf7")``. A
    node that is absent stands directly under nothing. With three levels these are the "about three
    rounds" of a screen.
    """
    deepest = max((len(place.get(node, ())) for node in nodes), default=0)
    rounds = []
    for shared in range(deepest, -1, -1):
        pairs: list[Pair] = []
        groups: dict[Hashable, dict[Hashable, list[str]]] = {}
        for node in nodes:
            path = tuple(place.get(node, ()))
            if len(path) >= shared:
                # Below the last switch, every node is a branch of its own.
                branch = path[shared] if len(path) > shared else (node,)
                groups.setdefault(path[:shared], {}).setdefault(branch, []).append(node)
        for branches in groups.values():
            pairs += _between(list(branches.values()))
        if pairs:
            rounds.append(tuple(pairs))
    return rounds


def _between(branches: list[list[str]]) -> list[Pair]:
    """A largest matching of nodes of different branches: in order of branches, each with the one half a
    turn on."""
    ordered = [node for branch in sorted(branches, key=len, reverse=True) for node in branch]
    largest = max(map(len, branches), default=0)
    shift = max(largest, (len(ordered) + 1) // 2)
    return [(ordered[i], ordered[i + shift]) for i in range(len(ordered) - shift)]


def recheck(results: Iterable[PairResult], rounds: int = FAILURES_OF_A_NODE) -> list[Round]:
    """Members of unresolved pairs again, each round with another partner that passed before."""
    seen = list(results)
    good = sorted(_passed(seen))
    met = _partners(seen)
    suspects = sorted({node for pair in diagnose(seen).unresolved for node in pair} - set(good))
    planned: list[Round] = []
    for _ in range(rounds):
        free = list(good)
        pairs: list[Pair] = []
        for node in suspects:
            partner = next((one for one in free if one not in met.setdefault(node, set())), None)
            if partner is not None:
                free.remove(partner)
                met[node].add(partner)
                pairs.append((node, partner))
        if pairs:
            planned.append(tuple(pairs))
    return planned


def diagnose(results: Iterable[PairResult]) -> Diagnosis:
    """Separate nodes from paths. A node that passed with anyone is good; what is left unproven is
    unresolved."""
    seen = list(results)
    good = _passed(seen)
    failed = [_ordered(result.pair) for result in seen if not result.passed]
    against: dict[str, set[str]] = {}
    for a, b in failed:
        against.setdefault(a, set()).add(b)
        against.setdefault(b, set()).add(a)
    guilty = {
        node
        for node, partners in against.items()
        if node not in good and len(partners & good) >= FAILURES_OF_A_NODE
    }
    passed = {_ordered(result.pair) for result in seen if result.passed}
    paths = sorted({p for p in failed if p[0] in good and p[1] in good and p not in passed})
    flapping = {p for p in failed if p in passed}
    explained = {p for p in failed if p[0] in guilty or p[1] in guilty} | set(paths)
    unresolved = sorted((set(failed) - explained) | flapping)
    return Diagnosis(tuple(sorted(guilty)), tuple(paths), tuple(unresolved))


def suspect_links(failed: Iterable[Collection[str]], passed: Iterable[Collection[str]]) -> tuple[str, ...]:
    """The fewest links that explain the failed paths and lie on no path that passed.

    Each path is the set of its links. One link on all failed paths is the answer if there is one; else
    links are taken by how many of the unexplained paths they are on. Empty if the passed paths clear
    every link.
    """
    cleared = {link for path in passed for link in path}
    open_paths = [left for path in failed if (left := set(path) - cleared)]
    chosen: list[str] = []
    while open_paths:
        counts: dict[str, int] = {}
        for path in open_paths:
            for link in path:
                counts[link] = counts.get(link, 0) + 1
        most = max(counts.values())
        best = sorted(link for link, count in counts.items() if count == most)
        # Links that are on the same paths cannot be told apart: name them all.
        same = [link for link in best if all((link in p) == (best[0] in p) for p in open_paths)]
        chosen += same
        open_paths = [path for path in open_paths if best[0] not in path]
    return tuple(chosen)


def _passed(results: Iterable[PairResult]) -> set[str]:
    return {node for result in results if result.passed for node in result.pair}


def _partners(results: Iterable[PairResult]) -> dict[str, set[str]]:
    met: dict[str, set[str]] = {}
    for result in results:
        a, b = result.pair
        met.setdefault(a, {a}).add(b)
        met.setdefault(b, {b}).add(a)
    return met


def _ordered(pair: Pair) -> Pair:
    return pair if pair[0] <= pair[1] else (pair[1], pair[0])
