"""One metric on nodes that should be alike: who differs from the others. Pure.

Every node has one voice, however many devices it has. A device is compared with the device of the same name
on the other nodes; where names are not shared (serial numbers), with all devices of all nodes; where there
are too few nodes, with its siblings on its own node. Without enough peers, or without agreement among them,
nobody is accused, and the result says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from probes.catalogue import PeerSpec
from probes.criteria import show
from probes.model import Value

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation is this times its median absolute deviation."""

FEWEST_VOTERS = 3
FEWEST_NUMBERS = 4
"""A median and a deviation of fewer values than this describe nothing."""

Sample = tuple[str, str | None, Value]
"""Node, device, value."""


@dataclass(frozen=True, slots=True)
class Outlier:
    """One value that differs from its peers."""

    node: str
    device: str | None
    value: Value
    limit: str
    """What would not have been accused, in the grammar of limits."""
    reference: str
    """The peers' numbers."""


@dataclass(frozen=True, slots=True)
class Comparison:
    outliers: tuple[Outlier, ...] = ()
    undecided: str = ""
    """Why nobody could be accused, though values differ or could not be compared; empty otherwise."""
    compared: bool = False
    """At least one value had enough peers."""


@dataclass(frozen=True, slots=True)
class _Vote:
    """What one group of values says about itself. Not `agreed`: there is nothing to hold against anybody."""

    agreed: bool
    accused: tuple[int, ...] = ()
    limit: str = ""
    reference: str = ""
    undecided: str = ""


Judge = Callable[[Sequence[Sample], str], _Vote]


def compare(samples: Iterable[Sample], spec: PeerSpec) -> Comparison:
    """Outliers of one metric among nodes of one kind, by the rule of `spec`.

    Values that are not known, and for numbers those that are none, have no voice and are not accused here.
    """
    if spec.rule == "majority":
        known = [s for s in samples if s[2] is not None]
        return _compare(known, spec.siblings, FEWEST_VOTERS, _majority)
    numbers = [s for s in samples if is_number(s[2])]
    return _compare(numbers, spec.siblings, FEWEST_NUMBERS, lambda group, of: _robust_z(group, of, spec))


def is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _compare(samples: Sequence[Sample], siblings: bool, fewest: int, judge: Judge) -> Comparison:
    outliers: list[Outlier] = []
    undecided: list[str] = []
    agreed = False

    def put(group: Sequence[Sample], of: str) -> bool:
        nonlocal agreed
        vote = judge(group, of)
        if vote.undecided and vote.undecided not in undecided:
            undecided.append(vote.undecided)
        outliers.extend(Outlier(*group[i], vote.limit, vote.reference) for i in vote.accused)
        agreed = agreed or vote.agreed
        return vote.agreed

    settled = [group for group in _across_nodes(samples, fewest) if put(group, "nodes")]
    if siblings:
        done = {(node, device) for group in settled for node, device, _ in group}
        for group in _by_node(samples).values():
            rest = [s for s in group if s[1] is not None and (s[0], s[1]) not in done]
            if len(rest) >= fewest:
                put(rest, "devices of the node")
    return Comparison(tuple(outliers), "; ".join(undecided), agreed or bool(undecided))


def _across_nodes(samples: Sequence[Sample], fewest: int) -> list[list[Sample]]:
    by_device: dict[str | None, dict[str, Sample]] = {}
    for sample in samples:
        by_device.setdefault(sample[1], {})[sample[0]] = sample
    shared = [list(nodes.values()) for nodes in by_device.values() if len(nodes) >= fewest]
    if shared:
        return shared
    if len({sample[0] for sample in samples}) >= fewest:
        return [list(samples)]
    return []


def _by_node(samples: Iterable[Sample]) -> Mapping[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample[0], []).append(sample)
    return groups


def _several_voices(group: Sequence[Sample]) -> bool:
    """Nodes with several devices are among several nodes, so that each has to be brought to one voice."""
    return 1 < len({s[0] for s in group}) < len(group)


def _majority(group: Sequence[Sample], of: str) -> _Vote:
    """Accuse who differs from what more than half of the nodes (or of one node's devices) say."""
    voices = [_key(s[2]) for s in group]
    ballots: Sequence[_Key | None] = voices
    if _several_voices(group):
        # A node whose devices disagree by halves has no voice, but it counts among those who might have.
        ballots = [_own_majority([_key(s[2]) for s in mine]) for mine in _by_node(group).values()]
    counts = Counter(ballot for ballot in ballots if ballot is not None)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], str(item[0][1])))
    winner, count = ranked[0] if ranked else (None, 0)
    if winner is None or count * 2 <= len(ballots):
        shares = ", ".join(f"{n} say {show(value)}" for (_, value), n in ranked[:4])
        return _Vote(
            False, undecided=f"no value has a majority among {len(ballots)} {of} ({shares or 'all disagree'})"
        )
    accused = tuple(i for i, voice in enumerate(voices) if voice != winner)
    return _Vote(True, accused, f"== {show(winner[1])}", f"{count} of {len(ballots)} {of}")


_Key = tuple[type, Value]


def _key(value: Value) -> _Key:
    """Equal for values that say the same: 1 is 1.0 and is neither true nor "1"."""
    kind = type(value)
    return (float if kind is int else kind, value)


def _own_majority(voices: Sequence[_Key]) -> _Key | None:
    best, count = Counter(voices).most_common(1)[0]
    return best if count * 2 > len(voices) else None


def _robust_z(group: Sequence[Sample], of: str, spec: PeerSpec) -> _Vote:
    """Accuse who is both far beyond the peers' own spread and beyond the floor.

    Median of the nodes' medians, and MAD the same way: a node with many devices has no more voice.
    """
    numbers = [_float(s[2]) for s in group]
    if _several_voices(group):
        of_node = [[_float(s[2]) for s in mine] for mine in _by_node(group).values()]
        voices = len(of_node)
        centre = median(median(mine) for mine in of_node)
        deviation = median(median(abs(x - centre) for x in mine) for mine in of_node)
    else:
        voices = len(numbers)
        centre = median(numbers)
        deviation = median(abs(x - centre) for x in numbers)
    spread = MAD_TO_SIGMA * deviation
    margin = max(spec.floor * abs(centre), spec.z * spread, spec.least)
    low = centre - margin if spec.worse in ("lower", "both") else -math.inf
    high = centre + margin if spec.worse in ("higher", "both") else math.inf
    accused = tuple(i for i, x in enumerate(numbers) if not low <= x <= high)
    if spec.worse == "both":
        limit = f"between {low:.6g} and {high:.6g}"
    else:
        limit = f">= {low:.6g}" if spec.worse == "lower" else f"<= {high:.6g}"
    reference = f"median {centre:.6g} of {voices} {of}, robust deviation {spread:.3g}"
    return _Vote(True, accused, limit, reference)


def _float(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)
