"""The gate before the update phase: when a rank's state may change, and which state it is in.

Between two updates the state of a rank is constant. The main thread passes the gate to change it; the saver
thread closes the gate to copy it. States are counted by a clock that is the same on all ranks: every change,
an update, a skipped batch or a return to a checkpoint, adds one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ltf.checkpoint.pieces import Piece
from ltf.findings import Json


@dataclass(frozen=True)
class Boundary:
    """A state between two updates. `version`: its optimizer steps. `generators`: the rank's, then."""

    clock: int
    version: int
    progress: Mapping[str, Json]
    generators: list[Piece]
    ready: torch.Event | None


class Gate:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._changing = False
        self._boundary: Boundary | None = None
        self._request: int | None = None
        self._requested = 0
        self._answered = 0
        self._hold: int | None = None
        self._refusal: Exception | None = None

    # The main thread's side.

    def enter(self) -> float:
        """Wait until the state may change; seconds waited. Raises what `refuse` was given."""
        start = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._refused_here() or not self._held())
            if self._refused_here():
                assert self._refusal is not None
                raise self._refusal
            self._changing = True
        return time.monotonic() - start

    def leave(self, boundary: Boundary) -> None:
        """The state is now this one; its clock is filled in here."""
        with self._changed:
            self._boundary = Boundary(
                self.clock + 1, boundary.version, boundary.progress, boundary.generators, boundary.ready
            )
            self._changing = False
            self._changed.notify_all()

    def request(self) -> Boundary:
        """Keep this state until `answer` is called with its clock."""
        with self._changed:
            boundary = self._boundary
            if boundary is None or self._changing:
                raise RuntimeError("a checkpoint can be asked for only between two updates")
            self._request = self._requested = boundary.clock
            self._changed.notify_all()
            return boundary

    def wait_answered(self) -> None:
        """Until every request has been dealt with to its end, or the gate refuses."""
        with self._changed:
            self._changed.wait_for(lambda: self._refusal is not None or self._answered >= self._requested)

    # The saver thread's side.

    @property
    def clock(self) -> int:
        return 0 if self._boundary is None else self._boundary.clock

    def requested(self, clock: int) -> Boundary:
        """Wait until the main thread has asked for that state."""
        with self._changed:
            self._changed.wait_for(lambda: self._requested >= clock)
            assert self._boundary is not None
            if self._requested != clock or self.clock != clock:
                raise RuntimeError(f"ranks differ in what they save: state {clock}, here {self.clock}")
            return self._boundary

    def copied(self, clock: int) -> None:
        """The requested state was copied, or will not be: it may change."""
        with self._changed:
            if self._request is not None and self._request <= clock:
                self._request = None
            self._changed.notify_all()

    def answer(self, clock: int) -> None:
        """The request is done with."""
        with self._changed:
            self._answered = max(self._answered, clock)
            self._changed.notify_all()

    def hold(self) -> int:
        """Begin no further change; the clock that this rank reaches without one."""
        with self._changed:
            self._hold = self.clock + self._changing
            return self._hold

    def allow(self, clock: int) -> Boundary:
        """Changes up to that clock may happen; wait until it is reached."""
        with self._changed:
            self._hold = clock
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.clock >= clock and not self._changing)
            assert self._boundary is not None
            return self._boundary

    def release(self) -> None:
        with self._changed:
            self._hold = None
            self._changed.notify_all()

    def refuse(self, reason: Exception) -> None:
        """From the state reached on, every attempt to change it raises this."""
        with self._changed:
            self._refusal = self._refusal or reason
            self._changed.notify_all()

    def _held(self) -> bool:
        limits = [limit for limit in (self._request, self._hold) if limit is not None]
        return bool(limits) and self.clock >= min(limits)

    def _refused_here(self) -> bool:
        return self._refusal is not None and (self._hold is None or self.clock >= self._hold)
