"""A sign of life from every rank, also while its training thread waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ltf.events import Heartbeat, Phase, Writer


class Heart:
    """Writes a heartbeat at an interval, from a thread of its own, also while training waits in a collective.

    The training thread says what it is at with `enter`, and with `advance` that it got on: a micro-batch, a
    file. A supervisor tells a hang from a slow step by `quiet_seconds`, which grows while nobody advances.
    """

    def __init__(self, writer: Writer, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer, self._interval, self._clock = writer, interval, clock
        now = clock()
        # One tuple, replaced whole: the other thread never sees half of a change.
        self._state = (0, Phase.START, now, 0, now)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def step(self) -> int:
        """The last that was entered."""
        return self._state[0]

    def enter(self, phase: Phase, step: int) -> None:
        """The training thread begins something; that is progress too."""
        now = self._clock()
        self._state = (step, phase, now, self._state[3] + 1, now)

    def advance(self) -> None:
        step, phase, began, progress, _ = self._state
        self._state = (step, phase, began, progress + 1, self._clock())

    def beat(self) -> None:
        """Write one now."""
        step, phase, began, progress, last = self._state
        now = self._clock()
        self._writer.write(Heartbeat(step, phase, now - began, progress, now - last))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        self.beat()
        while not self._stopped.wait(self._interval):
            self.beat()
