"""A valley in the middle of the profile of layers' parameter norms, which comes before a model's collapse.

In a healthy mixture of experts the norm of a layer's parameters grows with depth, or is flat; where the
middle layers stop to be used they shrink between two shoulders long before the loss shows it (the SIGMA
report, arXiv 2512.13488).

The *depth* of a valley: the layers in order are cut into a first quarter (at least two layers), a middle and
a last quarter. With s the smaller of the two quarters' medians and b the lowest mean of a few neighbouring
middle layers (a sixth of the middle; two, or one where the middle has fewer than four), depth = 1 - b / s. A
profile that rises, is flat, or falls to the end has no depth, however steep; an odd first or last layer does
not move a median much; and a single odd layer in the middle of a deep model is no valley.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean, median

from ltf.config.schema import CollapseGuard
from ltf.findings import Finding, Json, Severity

# Two layers a shoulder and one between them.
FEWEST_LAYERS = 5


@dataclass(frozen=True)
class Valley:
    """`depth`: see above, at most 0 where there is none. `layers`: those below the rim, side by side."""

    depth: float
    shoulder: float
    bottom: float
    layers: tuple[int, ...]


class CollapseWatch:
    """Judges profiles, taken at the interval of the settings by whoever calls.

    `layers`: those that may be compared because they have one shape, as `ModelArgs.moe_layers`; none: all
    that come. Models with fewer than five such layers are not judged: there is no middle between shoulders.

    A profile *opens* if its valley is at least half the permitted depth and half the permitted depth deeper
    than in the run's first profiles; what was there from the beginning (dense first layers, imported
    weights) is thus no finding while it stays as it is. A finding, `collapse.valley`, needs `patience`
    opening profiles in a row, the last at least as deep as permitted and not shallower than the first of
    them. It comes again when the valley has grown by another half of the permitted depth. Norms that are not
    finite, or zero, are left out: the finite guard has them.
    """

    def __init__(self, settings: CollapseGuard, layers: Collection[int] | None = None) -> None:
        self._settings = settings
        self._layers = None if layers is None else frozenset(layers)
        self._first: list[float] = []
        self._opening: list[float] = []
        self._reported: float | None = None

    def look(self, step: int, norms: Mapping[int, float]) -> list[Finding]:
        """`norms`: L2 norms (or root mean squares) of all of a layer's parameters, by layer index."""
        chosen = {i: n for i, n in norms.items() if self._layers is None or i in self._layers}
        if not self._settings.enabled or not chosen or not all(math.isfinite(n) for n in chosen.values()):
            return []
        valley = measure(chosen)
        if valley is None:
            return []
        if len(self._first) < self._settings.patience:
            self._first.append(valley.depth)
        # A single first profile must not be the measure of itself: the least so far is what it began with.
        beginning = max(0.0, min(self._first[0], median(self._first)))
        half = self._settings.depth / 2
        if valley.depth < beginning + half:
            self._opening.clear()
            self._reported = None
            return []
        self._opening = [*self._opening, valley.depth][-self._settings.patience :]
        patient = len(self._opening) >= self._settings.patience and valley.depth >= self._opening[0]
        known = self._reported is not None and valley.depth < self._reported + half
        if not patient or known or valley.depth < self._settings.depth:
            return []
        self._reported = valley.depth
        return [self._finding(step, valley, beginning, chosen)]

    def state(self) -> dict[str, Json]:
        """All of it, exact when written as JSON and read back."""
        return {"first": list(self._first), "opening": list(self._opening), "reported": self._reported}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Go on where `state()` was taken."""
        first, opening, reported = state["first"], state["opening"], state["reported"]
        assert isinstance(first, list)
        assert isinstance(opening, list)
        self._first = [float(depth) for depth in first if isinstance(depth, int | float)]
        self._opening = [float(depth) for depth in opening if isinstance(depth, int | float)]
        self._reported = float(reported) if isinstance(reported, int | float) else None

    def _finding(self, step: int, valley: Valley, beginning: float, norms: Mapping[int, float]) -> Finding:
        profile: dict[str, Json] = {str(layer): norms[layer] for layer in sorted(norms)}
        named: list[Json] = list(valley.layers)
        return Finding(
            "collapse.valley",
            Severity.WARNING,
            step,
            f"parameter norms of layers {valley.layers[0]} to {valley.layers[-1]} lie {valley.depth:.1%} "
            f"below those of the layers on both sides (limit {self._settings.depth:.1%}; "
            f"{beginning:.1%} at the beginning)",
            evidence={
                "depth": valley.depth, "limit": self._settings.depth, "beginning": beginning,
                "shoulder": valley.shoulder, "bottom": valley.bottom, "layers": named, "profile": profile,
            },
        )  # fmt: skip


def measure(norms: Mapping[int, float]) -> Valley | None:
    """The valley of a profile; None where there are fewer than five layers, or shoulders of no size."""
    order = sorted(norms)
    if len(order) < FEWEST_LAYERS:
        return None
    values = [norms[layer] for layer in order]
    side = max(2, len(values) // 4)
    shoulder = min(median(values[:side]), median(values[-side:]))
    if shoulder <= 0:
        return None
    middle = range(side, len(values) - side)
    width = 1 if len(middle) < 4 else max(2, len(middle) // 6)
    starts = range(middle.start, middle.stop - width + 1)
    lowest = min(starts, key=lambda start: fmean(values[start : start + width]))
    bottom = fmean(values[lowest : lowest + width])
    rim = (shoulder + bottom) / 2
    first, last = lowest, lowest + width - 1
    while first > 0 and values[first - 1] < rim:
        first -= 1
    while last + 1 < len(values) and values[last + 1] < rim:
        last += 1
    return Valley(1 - bottom / shoulder, shoulder, bottom, tuple(order[first : last + 1]))
