"""The steps that the job's present state is made of, in order; what was taken back is no longer among
them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stretch:
    """A step's time: work from `start` to `stall`, standing still for a save from there to `end`."""

    step: int
    start: int
    stall: int
    end: int
    faults: int
    """Faults known when it was done."""
    attempt: int


class Lineage:
    """A stack, with sums that answer any question about a prefix or a stretch of time by bisection.

    Columns instead of objects: a job of millions of steps is kept in some 50 bytes a step.
    """

    def __init__(self) -> None:
        self._step = array("q")
        self._start = array("q")
        self._stall = array("q")
        self._end = array("q")
        self._faults = array("l")
        self._attempt = array("q")
        self._counted = array("q", [0])
        self._work = array("q", [0])
        # Doubles: sums of tokens pass 64 bits long before they lose a digit that matters.
        self._tokens = array("d", [0.0])

    def __len__(self) -> int:
        return len(self._step)

    @property
    def last_step(self) -> int:
        return self._step[-1] if self._step else 0

    @property
    def last_attempt(self) -> int:
        return self._attempt[-1] if self._attempt else -1

    @property
    def last_end(self) -> int:
        return self._end[-1] if self._end else 0

    @property
    def last_faults(self) -> int:
        return self._faults[-1] if self._faults else 0

    def push(
        self, step: int, start: int, end: int, stall: int, tokens: int | None, faults: int, attempt: int
    ) -> None:
        """Add a step that begins where the last one ended or later, and whose number is no smaller."""
        self._append(step, start, end, stall, faults, attempt)
        self._counted.append(self._counted[-1] + 1)
        self._tokens.append(self._tokens[-1] + (tokens or 0))

    def push_work(self, start: int, end: int, faults: int, attempt: int) -> None:
        """Add work after the last step that is no step of its own; it survives if that step does."""
        self._append(self.last_step, start, end, 0, faults, attempt)
        self._counted.append(self._counted[-1])
        self._tokens.append(self._tokens[-1])

    def _append(self, step: int, start: int, end: int, stall: int, faults: int, attempt: int) -> None:
        self._step.append(step)
        self._start.append(start)
        self._stall.append(end - stall)
        self._end.append(end)
        self._faults.append(faults)
        self._attempt.append(attempt)
        self._work.append(self._work[-1] + end - stall - start)

    def after(self, step: int) -> int:
        """How many entries belong to the state after `step`."""
        return bisect_right(self._step, step)

    def cut(self, kept: int) -> None:
        """Forget all but the first `kept` entries."""
        for column in (self._step, self._start, self._stall, self._end, self._faults, self._attempt):
            del column[kept:]
        for sums in (self._counted, self._work, self._tokens):
            del sums[kept + 1 :]

    def stretches(self, first: int = 0) -> Iterator[Stretch]:
        columns = (self._step, self._start, self._stall, self._end, self._faults, self._attempt)
        for i in range(first, len(self._step)):
            yield Stretch(*(column[i] for column in columns))

    def work(self, kept: int) -> int:
        """Nanoseconds of work in the first `kept` entries."""
        return self._work[kept]

    def steps(self, kept: int) -> int:
        return self._counted[kept]

    def tokens(self, kept: int) -> int:
        return int(self._tokens[kept])

    def work_between(self, start: int, end: int, kept: int) -> int:
        """Nanoseconds of work of the first `kept` entries between two times."""
        return self._work_until(end, kept) - self._work_until(start, kept)

    def _work_until(self, when: int, kept: int) -> int:
        whole = bisect_left(self._end, when, 0, kept)
        begun = 0
        if whole < kept and self._start[whole] < when:
            begun = min(when, self._stall[whole]) - self._start[whole]
        return self._work[whole] + begun
