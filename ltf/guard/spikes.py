"""Sudden rises of the loss and of gradient norms, against their own recent past.

A value is compared with the last accepted ones: z = (x - centre) / max(1.4826 MAD, floor * median). Only
a rise is a spike. A loss that falls fast would widen its own deviation, so the MAD is that of the
distances from a line through the medians of the window's older and newer half; the centre is the median
or, where that is higher, the line's end. The threshold moves with the run. One taken from the first
hundred losses, which begin near the logarithm of the vocabulary's size, lies for ever above what any
later spike reaches.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ltf.config.schema import SpikeGuard
from ltf.findings import Finding, Json, Severity

# 1 / 0.6745: what makes the median absolute deviation of a Gaussian its standard deviation.
GAUSSIAN = 1.4826
# A median and a MAD of fewer values than this are too rough for limits such as 10 deviations.
ENOUGH = 32


@dataclass(frozen=True)
class Rise:
    """A value far above the centre of its past; up to `limit` it would not have been."""

    value: float
    centre: float
    deviation: float
    z: float
    limit: float

    def evidence(self) -> dict[str, Json]:
        return {
            "value": self.value, "centre": self.centre, "deviation": self.deviation,
            "z": self.z, "limit": self.limit,
        }  # fmt: skip


class SpikeWatch:
    """Judges each step's loss, global gradient norm and layers' gradient norms, all before clipping.

    Findings: `spike.loss`, `spike.norm`, `spike.layer` (one for all layers that spike in the step) and,
    when a new level is accepted, `spike.level`. Numbers that are not finite are the finite guard's: here
    they are left out. A function of what it was shown, so ranks that are shown the same agree.
    """

    def __init__(self, settings: SpikeGuard) -> None:
        self._settings = settings
        self._loss = Series(settings, settings.loss_z)
        self._norm = Series(settings, settings.norm_z)
        self._layers: dict[int, Series] = {}

    def look(self, step: int, loss: float, norm: float, layer_norms: Mapping[int, float]) -> list[Finding]:
        """`loss` in nats a token; `layer_norms`: L2 norms by layer index, whichever layers there are."""
        if not self._settings.enabled:
            return []
        found = []
        for what, series, value in (("loss", self._loss, loss), ("norm", self._norm, norm)):
            rise = series.look(value)
            if rise is not None:
                found.append(_spike(step, what, rise, series.z))
            if series.settled:
                found.append(_level(step, what, series))
        rises: dict[int, Rise] = {}
        for layer, value in sorted(layer_norms.items()):
            series = self._layers.setdefault(layer, Series(self._settings, self._settings.norm_z))
            rise = series.look(value)
            if rise is not None:
                rises[layer] = rise
            if series.settled:
                found.append(_level(step, f"norm of layer {layer}", series))
        if rises:
            found.append(_layer_spike(step, rises, self._settings.norm_z))
        return found

    def state(self) -> dict[str, Json]:
        """All of it, exact when written as JSON and read back."""
        layers: dict[str, Json] = {str(layer): series.state() for layer, series in self._layers.items()}
        return {"loss": self._loss.state(), "norm": self._norm.state(), "layers": layers}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Go on where `state()` was taken; a window that has been made smaller since keeps the newest."""
        loss, norm, layers = state["loss"], state["norm"], state["layers"]
        assert isinstance(loss, dict)
        assert isinstance(norm, dict)
        assert isinstance(layers, dict)
        self._loss.restore(loss)
        self._norm.restore(norm)
        self._layers = {}
        for layer, saved in layers.items():
            assert isinstance(saved, dict)
            series = Series(self._settings, self._settings.norm_z)
            series.restore(saved)
            self._layers[int(layer)] = series


class Series:
    """The past of one number and the judgement of its next value.

    A flagged value stays out of the window, so spikes neither raise the median nor widen the deviation.
    That alone would flag a level that is there to stay for ever. Hence: once `doubts` of the last `2 *
    doubts` values were flagged (an eighth of the window, at least 4), these are the new past, and the old
    is forgotten.
    """

    def __init__(self, settings: SpikeGuard, z: float) -> None:
        self.z = z
        self.settled = False
        self._settings = settings
        self._doubts = max(4, settings.window // 8)
        self._enough = min(settings.warmup, settings.window, max(ENOUGH, 2 * self._doubts))
        self._seen = 0
        self._window: deque[float] = deque()
        self._sorted: list[float] = []
        self._recent: deque[float | None] = deque(maxlen=2 * self._doubts)

    def look(self, value: float) -> Rise | None:
        """Judge a value and remember it. `settled` then tells whether a new level has just been accepted."""
        self.settled = False
        if not math.isfinite(value):
            return None
        self._seen += 1
        rise = self._judge(value)
        self._recent.append(None if rise is None else value)
        if rise is None:
            self._accept(value)
            return None
        doubted = [flagged for flagged in self._recent if flagged is not None]
        if len(doubted) >= self._doubts:
            self._begin(doubted)
            self.settled = True
        return rise

    @property
    def median(self) -> float:
        """Of the window, which must not be empty."""
        return _median(self._sorted)

    def state(self) -> dict[str, Json]:
        return {"seen": self._seen, "window": list(self._window), "recent": list(self._recent)}

    def restore(self, state: Mapping[str, Json]) -> None:
        seen, window, recent = state["seen"], state["window"], state["recent"]
        assert isinstance(seen, int)
        assert isinstance(window, list)
        assert isinstance(recent, list)
        self._seen = seen
        self._begin(float(value) for value in window if isinstance(value, int | float))
        self._recent.extend(float(value) if isinstance(value, int | float) else None for value in recent)

    def _judge(self, value: float) -> Rise | None:
        if self._seen <= self._settings.warmup or len(self._window) < self._enough:
            return None
        median = self.median
        least = self._settings.floor * abs(median)
        # Almost every value ends here, without the deviation, which takes time in the window's length.
        if value - median <= self.z * least:
            return None
        centre, spread = self._around(median)
        deviation = max(GAUSSIAN * spread, least)
        # A past of zeros (a frozen layer) tells nothing about how far is far.
        if deviation == 0 or value - centre <= self.z * deviation:
            return None
        return Rise(value, centre, deviation, (value - centre) / deviation, centre + self.z * deviation)

    def _around(self, median: float) -> tuple[float, float]:
        """Where the next value is expected at most, and the MAD around the trend."""
        past = list(self._window)
        half = len(past) // 2
        older, newer = _median(sorted(past[:half])), _median(sorted(past[-half:]))
        slope = (newer - older) / (len(past) - half)
        start = older - slope * (half - 1) / 2
        spread = _median(sorted(abs(seen - start - slope * place) for place, seen in enumerate(past)))
        return max(median, start + slope * len(past)), spread

    def _accept(self, value: float) -> None:
        self._window.append(value)
        insort(self._sorted, value)
        if len(self._window) > self._settings.window:
            del self._sorted[bisect_left(self._sorted, self._window.popleft())]

    def _begin(self, values: Iterable[float]) -> None:
        self._window.clear()
        self._sorted.clear()
        self._recent.clear()
        for value in values:
            self._accept(value)


def _median(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _spike(step: int, what: str, rise: Rise, z: float) -> Finding:
    name = "loss" if what == "loss" else "gradient norm"
    return Finding(
        f"spike.{what}",
        Severity.WARNING,
        step,
        f"{name} {rise.value:.6g} lies {rise.z:.3g} deviations above its recent {rise.centre:.6g} "
        f"(limit {z:g}: {rise.limit:.6g})",
        evidence=rise.evidence(),
    )


def _layer_spike(step: int, rises: Mapping[int, Rise], z: float) -> Finding:
    worst, rise = max(rises.items(), key=lambda item: item[1].z)
    others = f", and of {len(rises) - 1} other layers" if len(rises) > 1 else ""
    layers: dict[str, Json] = {str(layer): each.evidence() for layer, each in rises.items()}
    return Finding(
        "spike.layer",
        Severity.WARNING,
        step,
        f"gradient norm {rise.value:.6g} of layer {worst} lies {rise.z:.3g} deviations above its recent "
        f"{rise.centre:.6g} (limit {z:g}: {rise.limit:.6g}){others}",
        evidence={"layers": layers},
    )


def _level(step: int, what: str, series: Series) -> Finding:
    return Finding(
        "spike.level",
        Severity.WARNING,
        step,
        f"{what} has stayed high: {series.median:.6g} is from now on its level and no longer flagged",
        evidence={"of": what, "median": series.median},
    )
