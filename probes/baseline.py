"""Learned baselines: what a kind of node usually measures, and how like it a new sample is. Pure.

After SuperBench (Xiong et al., USENIX ATC '24): a reference distribution of each metric is learned from the
fleet's own history, and a node whose distribution is less than 95 % similar to it, on the worse side, is odd.
Similarity is 1 - A / m, A the area between the two empirical CDFs where the sample is the worse one, m the
reference's median: a sample that is 5 % worse throughout has 0.95.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from probes.catalogue import BaselineSpec
from probes.peers import MAD_TO_SIGMA

FEWEST_NODES = 5
"""Fewer nodes are no distribution of a fleet."""

VALUES_OF_ONE = 32
"""Quantiles that stand for one node, so that a node measured often does not outweigh the others."""

REFERENCE_VALUES = 256

TRIM_Z = 3.5
"""Robust deviations beyond which a value is not one of its peers (Iglewicz and Hoaglin, 1993)."""

MOST_SCATTER = 0.5
"""A bound farther than this part of the median away from it separates nothing."""

Worse = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """The distribution of one metric on one SKU."""

    spec: BaselineSpec
    reference: tuple[float, ...]
    """Sorted."""
    centre: float
    """Median of the kept nodes' medians."""
    bound: float
    """The worst single value that is still accepted."""
    nodes: int
    """Nodes it was learned from."""
    trimmed: tuple[str, ...] = ()
    """Nodes that were left out as not alike."""

    def accepts(self, value: float) -> bool:
        """Whether a measured value is like the fleet's history.

        For several values of a node (its devices) it is enough to ask for each: the area of their common
        distribution is at most the mean of their areas.
        """
        return value >= self.bound if self.spec.worse == "lower" else value <= self.bound

    @property
    def limit(self) -> str:
        return f"{'>=' if self.spec.worse == 'lower' else '<='} {self.bound:.6g}"

    def describe(self, value: float) -> str:
        """The numbers behind a judgement of `value`."""
        alike = similarity([value], self.reference, self.spec.worse)
        return (
            f"similarity {alike:.3f} to the history of {self.nodes} nodes (median {self.centre:.6g}, "
            f"at least {self.spec.similarity:g} wanted)"
        )


@dataclass(frozen=True, slots=True)
class Unlearned:
    """Why there is no baseline."""

    reason: str


def similarity(sample: Sequence[float], reference: Sequence[float], worse: Worse | None = None) -> float:
    """1 - area between the empirical CDFs / reference's median; 1.0 is alike, it can fall below 0.

    With `worse`, only the area where `sample` is worse counts. Both must be sorted and finite, and not empty.
    """
    scale = abs(median(reference)) or max(
        abs(reference[0]), abs(reference[-1]), abs(sample[0]), abs(sample[-1])
    )
    if scale == 0:
        return 1.0
    points = sorted({*sample, *reference})
    area = 0.0
    for left, right in pairwise(points):
        share_sample = bisect_right(sample, left) / len(sample)
        share_reference = bisect_right(reference, left) / len(reference)
        # More of the sample lies at or below this point: there the sample is the lower one.
        difference = share_sample - share_reference
        if worse == "lower":
            difference = max(difference, 0.0)
        elif worse == "higher":
            difference = max(-difference, 0.0)
        area += abs(difference) * (right - left)
    return 1.0 - area / scale


def learn(history: Mapping[str, Sequence[float]], spec: BaselineSpec) -> Baseline | Unlearned:
    """A baseline from node -> values that it measured in the past.

    Nodes whose median is far from the median of medians are left out, again and again until none is. If fewer
    than two thirds remain, the fleet does not agree with itself, and nothing is learned.
    """
    samples = {node: finite for node, values in history.items() if (finite := _sorted_finite(values))}
    if len(samples) < FEWEST_NODES:
        return Unlearned(f"only {len(samples)} nodes have a history; {FEWEST_NODES} are needed")
    medians = {node: median(values) for node, values in samples.items()}
    kept, centre = _trim(medians, 1 - spec.similarity)
    if 3 * len(kept) < 2 * len(samples):
        return Unlearned(f"only {len(kept)} of {len(samples)} nodes are alike")
    pooled = sorted(x for node in kept for x in _quantiles(samples[node], VALUES_OF_ONE))
    reference = tuple(_quantiles(pooled, REFERENCE_VALUES))
    bound = _bound(reference, spec)
    if abs(bound - centre) > MOST_SCATTER * abs(centre):
        return Unlearned(f"they scatter too much to tell a bad one (median {centre:.6g}, bound {bound:.6g})")
    trimmed = tuple(sorted(node for node in samples if node not in kept))
    return Baseline(spec, reference, centre, bound, len(kept), trimmed)


def _bound(reference: Sequence[float], spec: BaselineSpec) -> float:
    """The worst value that is similar enough, or that lies within what the fleet itself scatters."""
    direction = -1.0 if spec.worse == "lower" else 1.0
    middle = median(reference)
    spread = MAD_TO_SIGMA * median(abs(x - middle) for x in reference)
    usual = middle + direction * TRIM_Z * spread
    inside, outside = middle, middle + direction * (2 * abs(middle) + 10 * spread)
    if similarity([middle], reference, spec.worse) < spec.similarity:
        return usual
    for _ in range(50):
        between = (inside + outside) / 2
        if similarity([between], reference, spec.worse) >= spec.similarity:
            inside = between
        else:
            outside = between
    return min(inside, usual) if spec.worse == "lower" else max(inside, usual)


def _trim(medians: Mapping[str, float], floor: float) -> tuple[set[str], float]:
    """Nodes that are alike, and their median. `floor`: the relative difference that is always allowed."""
    kept = set(medians)
    while True:
        values = [medians[node] for node in kept]
        centre = median(values)
        spread = MAD_TO_SIGMA * median(abs(x - centre) for x in values)
        margin = max(floor * abs(centre), TRIM_Z * spread)
        alike = {node for node in kept if abs(medians[node] - centre) <= margin}
        if alike == kept:
            return kept, centre
        kept = alike


def _sorted_finite(values: Sequence[float]) -> list[float]:
    return sorted(float(x) for x in values if math.isfinite(x))


def _quantiles(ordered: Sequence[float], count: int) -> list[float]:
    """At most `count` values with the distribution of the sorted `ordered`."""
    if len(ordered) <= count:
        return list(ordered)
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
