"""Shapes of the report's charts as SVG path data and rectangles, thinned to what a screen can show.

All shapes live in a box of `WIDTH` x `HEIGHT` units that the page stretches to its own width; they hold
numbers alone, never text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recovery.accounting import Bucket, Span
from recovery.jobreport.report import Stretch, drawable

WIDTH = 1000
HEIGHT = 220
MOST_STRETCHES = 300
"""More are not told apart by eye: the longest are drawn."""
LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which a logarithmic axis shows more."""


@dataclass(frozen=True)
class Tick:
    at: float
    """Percent of the box's width or height, from left or top."""
    label: str


@dataclass(frozen=True)
class Line:
    path: str
    redone: bool
    attempt: int


@dataclass(frozen=True)
class Chart:
    lines: tuple[Line, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    starts: tuple[Tick, ...]
    """Where attempts began, as percent of the width."""
    gone: tuple[Tick, ...]
    """Where the value was no number."""
    logarithmic: bool
    left_out: int
    """Stretches that are not drawn."""


@dataclass(frozen=True)
class Bar:
    x: float
    width: float
    bucket: Bucket


def bars(spans: Sequence[Span], start: int, end: int, columns: int = WIDTH) -> tuple[Bar, ...]:
    """The timeline from `start` to `end`; each column shows the bucket that has most of it."""
    if end <= start:
        return ()
    shares: list[dict[Bucket, float]] = [{} for _ in range(columns)]
    scale = columns / (end - start)
    for span in spans:
        left, right = (span.start - start) * scale, (span.end - start) * scale
        for column in range(max(0, int(left)), min(columns, math.ceil(right))):
            share = min(right, column + 1) - max(left, column)
            shares[column][span.bucket] = shares[column].get(span.bucket, 0.0) + share
    found: list[Bar] = []
    unit = WIDTH / columns
    for column, held in enumerate(shares):
        if not held:
            continue
        bucket = max(held, key=lambda one: held[one])
        left = column * unit
        if found and found[-1].bucket is bucket and abs(found[-1].x + found[-1].width - left) < 1e-6:
            found[-1] = Bar(found[-1].x, found[-1].width + unit, bucket)
        else:
            found.append(Bar(left, unit, bucket))
    return tuple(found)


def chart(stretches: Sequence[Stretch], which: str, *, from_zero: bool) -> Chart | None:
    """The curve of ``loss`` or ``rate`` over steps; None when there is no value at all."""
    drawn = sorted(range(len(stretches)), key=lambda i: -len(stretches[i].steps))[:MOST_STRETCHES]
    drawn.sort()
    values = [v for one in stretches for v in _range(getattr(one, which))]
    if not values:
        return None
    low, high = min(values), max(values)
    logarithmic = not from_zero and low > 0 and high / low > LOG_FROM
    if from_zero:
        low = min(0.0, low)
    if not logarithmic:
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        low, high = (low if from_zero and low == 0 else low - margin), high + margin
    elif high == low:
        high = low * 10
    first = min(one.steps[0] for one in stretches)
    last = max([one.steps[-1] for one in stretches] + [first + 1])
    scale = _Scale(first, last, low, high, logarithmic)
    kept = _survive_until(stretches)
    lines = []
    for number in drawn:
        one = stretches[number]
        for redone in (True, False):
            if path := _path(one, getattr(one, which), kept[number], redone, scale):
                lines.append(Line(path, redone, one.attempt))
    lines.sort(key=lambda line: not line.redone)
    begun: dict[int, int] = {}
    for one in stretches:
        begun.setdefault(one.attempt, one.steps[0])
    gone = (
        sorted({round(scale.x(step)) for one in stretches for step in one.lossless})
        if which == "loss"
        else []
    )
    return Chart(
        lines=tuple(lines),
        x=tuple(Tick(scale.x(t) / WIDTH * 100, f"{t:,.0f}") for t in nice(first, last, 6) if t == int(t)),
        y=tuple(Tick(scale.y(t) / HEIGHT * 100, short(t)) for t in scale.ticks()),
        starts=tuple(
            Tick(scale.x(step) / WIDTH * 100, str(attempt))
            for attempt, step in list(begun.items())[-MOST_STRETCHES:]
        ),
        gone=tuple(Tick(x / WIDTH * 100, "") for x in gone),
        logarithmic=logarithmic,
        left_out=len(stretches) - len(drawn),
    )


def nice(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two others, roughly `about` of them."""
    raw = (high - low) / max(about, 1)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw), 10 * power)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """``1.5k``, ``2M``, ``0.02``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class _Scale:
    first: int
    last: int
    low: float
    high: float
    logarithmic: bool

    def x(self, step: float) -> float:
        return (step - self.first) / (self.last - self.first) * WIDTH

    def y(self, value: float) -> float:
        if self.logarithmic:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return (1 - share) * HEIGHT

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return nice(self.low, self.high, 4)
        powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        thinned = list(powers)[:: max(1, len(powers) // 5)]
        ticks = [10.0**power for power in thinned]
        return ticks if len(ticks) > 1 else [self.low, math.sqrt(self.low) * math.sqrt(self.high), self.high]


def _range(values: Iterable[float]) -> tuple[float, ...]:
    finite = [v for v in values if drawable(v)]
    return (min(finite), max(finite)) if finite else ()


def _survive_until(stretches: Sequence[Stretch]) -> list[int]:
    """For each stretch the first step that a later one took again."""
    kept: list[int] = []
    again = max((one.steps[-1] for one in stretches), default=0) + 1
    for one in reversed(stretches):
        kept.append(again)
        again = min(again, one.steps[0])
    return kept[::-1]


def _path(one: Stretch, values: Sequence[float], kept: int, redone: bool, scale: _Scale) -> str:
    """A line with, in every column of the box, the first, smallest, largest and last value: no spike is
    lost."""
    parts: list[str] = []
    column: list[tuple[float, float]] = []
    pen_up = True

    def flush() -> None:
        nonlocal pen_up
        low, high = min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])
        shown = dict.fromkeys(sorted({column[0], low, high, column[-1]}))
        for step, value in shown:
            at = f"{scale.x(step):.1f} {scale.y(value):.1f}"
            # A lone point has no length; with "h0" a round line cap shows it all the same.
            parts.append(f"M{at}h0" if pen_up else f"L{at}")
            pen_up = False
        column.clear()

    place = -1
    for step, value in zip(one.steps, values, strict=True):
        if (step >= kept) is not redone:
            continue
        if not drawable(value):
            if column:
                flush()
            pen_up = True
            continue
        here = int(scale.x(step))
        if column and here != place:
            flush()
        place = here
        column.append((step, value))
    if column:
        flush()
    return "".join(parts)
