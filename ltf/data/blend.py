"""Which source a sample comes from: a schedule that keeps every weight to within one sample at every moment.

Weights become whole parts of a period (weights 0.7, 0.2, 0.1: parts 7, 2, 1 of 10). Within the period sources
take turns by Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): after any
number n of samples, a source with share w has given between ``w n - 1`` and ``w n + 1`` of them. Since the
period repeats, sample i is a table look-up: nothing has to be counted from the start.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np
import numpy.typing as npt

from ltf.data.errors import DataError

Int64s = npt.NDArray[np.int64]
# Percentages with three decimals are exact; weights that need a longer period are rounded to 1/100,000.
LONGEST_PERIOD = 100_000


class Schedule:
    """For any sample index: its source, and how many samples that source gave before.

    ``parts`` are the weights that hold exactly: whole numbers whose sum is the period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.parts = whole_parts(weights)
        self.period = sum(self.parts)
        self._source = np.array(_turns(self.parts), np.int64)
        self._before = np.zeros(self.period, np.int64)
        for source, part in enumerate(self.parts):
            self._before[self._source == source] = np.arange(part)
        self._each = np.array(self.parts, np.int64)

    def __call__(self, samples: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """(source, index within the source) of each global sample index."""
        rounds, place = np.divmod(np.asarray(samples, np.int64), self.period)
        source = self._source[place]
        return source, rounds * self._each[source] + self._before[place]

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` each source gives."""
        rounds, place = divmod(samples, self.period)
        rest = np.bincount(self._source[:place], minlength=len(self.parts))
        return [rounds * part + int(extra) for part, extra in zip(self.parts, rest, strict=True)]


def whole_parts(weights: Sequence[float]) -> list[int]:
    """The weights as whole parts of a period of at most ``LONGEST_PERIOD``; each source keeps at least one
    part.

    A weight means its decimal form: 0.1 is a tenth. Those that don't fit are rounded by largest remainder.
    """
    if not weights:
        raise DataError("a blend needs at least one source")
    if len(weights) > LONGEST_PERIOD // 10:
        raise DataError(f"{len(weights)} sources; a blend holds at most {LONGEST_PERIOD // 10}")
    for number, weight in enumerate(weights):
        if not isfinite(weight) or weight <= 0:
            raise DataError(f"weight {weight} of source {number}: expected a number above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(share.denominator for share in exact))
    parts = [int(share * scale) for share in exact]
    shared = gcd(*parts)
    parts = [part // shared for part in parts]
    if sum(parts) <= LONGEST_PERIOD:
        return parts
    whole, spare = sum(parts), LONGEST_PERIOD - len(parts)
    # One part for each, and the rest in proportion to what its weight asks beyond that one.
    wanted = [max(Fraction(part * LONGEST_PERIOD, whole) - 1, Fraction(0)) for part in parts]
    wanted = [share * spare / sum(wanted) for share in wanted]
    rounded = [int(share) for share in wanted]
    by_remainder = sorted(range(len(parts)), key=lambda s: (rounded[s] - wanted[s], s))
    for source in by_remainder[: spare - sum(rounded)]:
        rounded[source] += 1
    return [part + 1 for part in rounded]


def _turns(parts: Sequence[int]) -> list[int]:
    """Tijdeman's schedule for one period: the source of each place.

    With k sources and m = 2k - 2, the c-th turn (from 0) of a source with share w may come at step n (from 1)
    when ``w n - c >= 1/m`` and must come before ``w n - c`` would pass ``1 - 1/m`` by a step; of those that
    may, the one that must soonest goes. In whole numbers, so that no rounding can break the bound.
    """
    if len(parts) == 1:
        return [0] * parts[0]
    period, m = sum(parts), 2 * len(parts) - 2
    given = [0] * len(parts)

    def release(source: int) -> int:
        return -(-period * (1 + m * given[source]) // (m * parts[source]))

    def deadline(source: int) -> int:
        return period * (m * (1 + given[source]) - 1) // (m * parts[source])

    waiting = [(release(source), source) for source in range(len(parts))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    turns = []
    for step in range(1, period + 1):
        while waiting and waiting[0][0] <= step:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (deadline(source), source))
        source = heapq.heappop(ready)[1]
        turns.append(source)
        given[source] += 1
        heapq.heappush(waiting, (release(source), source))
    return turns
