"""Who takes how many micro-batches of a step, so that fast and slow ranks finish together.

A *unit* is what must run the same number of micro-batches: the ranks of one expert-parallel group with all
their pipeline stages. The step's samples and their order do not change, only who computes which; so the
gradient stays that of the same global batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ltf.config import schema
from ltf.data.errors import DataError
from ltf.data.order import micro_batches
from ltf.findings import Json


@dataclass(frozen=True)
class Plan:
    """From `step` on, unit u takes `counts[u]` micro-batches a step.

    `seconds_before`, `seconds_after`: the slowest unit's own work in a step, by the old and the new plan.
    """

    step: int
    counts: tuple[int, ...]
    counts_before: tuple[int, ...]
    seconds_before: float
    seconds_after: float


def plan(total: int, seconds: Sequence[float], least: int = 1) -> tuple[int, ...]:
    """Counts that add up to `total`, none under `least`, with the smallest possible max(count * seconds).

    `seconds`: of one micro-batch, by unit. Every unit gets `least`, then each further micro-batch goes to the
    unit that would finish it first; of several such to the one with the lowest number.

    That is optimal. Let the largest product of the result, M = c * t, be unit u's. If c = `least`, no counts
    do better. Otherwise look at the moment when u got its c-th: every other unit v, with c_v at that moment,
    had (c_v + 1) * t_v >= M, or it would have got it. Counts d with a largest product under M would have
    d_u < c and, for every v, d_v < c_v + 1. Together they would be fewer than had been given at that moment,
    thus fewer than `total`. The result's own product of u is M to the end, since no later one exceeds it.
    """
    if not seconds or any(not (math.isfinite(each) and each > 0) for each in seconds):
        raise ValueError(f"seconds of a micro-batch by unit: found {list(seconds)}, expected numbers above 0")
    if total < least * len(seconds) or least < 1:
        raise ValueError(f"{total} micro-batches do not give {len(seconds)} units at least {least} each")
    counts = [least] * len(seconds)
    for _ in range(total - least * len(seconds)):
        first = min(range(len(seconds)), key=lambda unit: (counts[unit] + 1) * seconds[unit])
        counts[first] += 1
    return tuple(counts)


def even(total: int, units: int) -> tuple[int, ...]:
    """The static plan; the first units take one more where it does not divide."""
    return plan(total, [1.0] * units)


def share(
    samples: range, counts: Sequence[int], unit: int, member: int = 0, members: int = 1, micro: int = 1
) -> list[range]:
    """The micro-batches, of `micro` samples each, of one data rank in a step.

    Units take contiguous runs of the step's samples in order, and so do the `members` data ranks of a unit,
    each `counts[unit]` micro-batches. With equal counts that is what ``data.order.share_of_rank`` gives data
    rank ``unit * members + member``.
    """
    if not (0 <= unit < len(counts) and 0 <= member < members):
        raise ValueError(f"unit {unit} of {len(counts)}, member {member} of {members}")
    if len(samples) != sum(counts) * members * micro:
        raise DataError(
            f"{len(samples)} samples a step are not {sum(counts)} micro-batches of {micro} samples on each "
            f"of {members} data ranks of a unit"
        )
    first = (sum(counts[:unit]) * members + member * counts[unit]) * micro
    return micro_batches(samples[first : first + counts[unit] * micro], micro)


def by_unit(seconds: Sequence[float], units: Sequence[int]) -> list[float]:
    """Seconds of a micro-batch by rank, and each rank's unit -> by unit: its slowest rank's."""
    slowest = [0.0] * (max(units) + 1)
    for each, unit in zip(seconds, units, strict=True):
        # A rank that measured nothing makes its unit unknown, not fast.
        slowest[unit] = math.nan if math.isnan(each + slowest[unit]) else max(slowest[unit], each)
    return slowest


class Balancer:
    """Follows measured speeds and says when another plan is worth it. Pure and the same on every rank.

    `total`: micro-batches of a step over all units, `least`: a unit's fewest (a pipeline may need more than
    one). A speed is the median over `settings.window` steps; a plan comes at multiples of
    `settings.every_steps`, and only when it promises `settings.threshold` times the speed of the present one
    by the whole window and by its halves, and would have saved `settings.saved_seconds` in it: a disturbance
    that passes, and noise in steps too short to matter, move nothing.
    """

    def __init__(self, settings: schema.Balance, units: int, total: int, least: int = 1) -> None:
        self.counts = even(total, units)
        if min(self.counts) < least:
            raise ValueError(f"{total} micro-batches do not give {units} units at least {least} each")
        self._settings, self._units, self._total, self._least = settings, units, total, least
        self._seen: deque[tuple[float, ...]] = deque(maxlen=settings.window)

    def observe(self, step: int, seconds: Sequence[float]) -> None:
        """Seconds of a micro-batch by unit in a step; one not measured everywhere is passed over."""
        if len(seconds) != self._units:
            raise ValueError(f"step {step}: {len(seconds)} measurements of {self._units} units")
        if all(math.isfinite(each) and each > 0 for each in seconds):
            self._seen.append(tuple(seconds))

    def replan(self, step: int) -> Plan | None:
        """The plan that holds from `step` on, if it is another one; `counts` then is that."""
        settings = self._settings
        if settings.mode != "auto" or step % settings.every_steps or len(self._seen) < settings.window:
            return None
        seen = list(self._seen)
        speeds = _medians(seen)
        counts = plan(self._total, speeds, self._least)
        before, after = _slowest(self.counts, speeds), _slowest(counts, speeds)
        half = len(seen) // 2
        views = [speeds, *(_medians(part) for part in (seen[:half], seen[half:]) if part)]
        worth = all(
            _slowest(self.counts, view) >= settings.threshold * _slowest(counts, view) for view in views
        )
        saved = (before - after) * len(seen)
        if counts == self.counts or not worth or saved < settings.saved_seconds:
            return None
        made = Plan(step, counts, self.counts, before, after)
        self.counts = counts
        return made

    def state(self) -> dict[str, Json]:
        """For a checkpoint."""
        return {"counts": list(self.counts), "seen": [list(row) for row in self._seen]}

    def restore(self, state: dict[str, Json]) -> None:
        """Take up a state. One of another number of units or micro-batches means nothing here and is left."""
        counts, seen = state["counts"], state["seen"]
        if not isinstance(counts, list) or not isinstance(seen, list):
            raise ValueError(f"not a balancer's state: {state}")
        given = tuple(count for count in counts if isinstance(count, int))
        if len(given) == self._units and sum(given) == self._total and min(given) >= self._least:
            self.counts = given
            self._seen.clear()
            self._seen.extend(
                tuple(float(each) for each in row if isinstance(each, (int, float)))
                for row in seen
                if isinstance(row, list)
            )


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [median(unit) for unit in zip(*rows, strict=True)]


def _slowest(counts: Sequence[int], seconds: Sequence[float]) -> float:
    return max(count * each for count, each in zip(counts, seconds, strict=True))
