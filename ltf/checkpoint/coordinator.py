"""Rank 0's thread that decides when to save: on request, on demand, by time, again after a failure."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ltf.checkpoint.orders import Demand, Kind, Order, Orders
from ltf.checkpoint.patience import Patience

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Requested:
    """The main threads keep their state at this clock until it is copied or skipped."""

    clock: int


@dataclass(frozen=True)
class Done:
    """An order was carried out. `saved`: the clock of a state that is now on disk; `failed`: it should be."""

    saved: int | None = None
    failed: bool = False


@dataclass(frozen=True)
class Close:
    pass


class Coordinator:
    """`clock`: seconds, monotonic. `stuck`: called once when patience ends in the middle of a save.

    `lost`: called with the error that ended this thread.
    """

    def __init__(
        self,
        orders: Orders,
        patience: Patience,
        clock: Callable[[], float],
        stuck: Callable[[], None],
        lost: Callable[[Exception], None],
        *,
        every_seconds: float | None,
        retry_seconds: float | None,
    ) -> None:
        self.inbox: queue.SimpleQueue[Requested | Done | Close] = queue.SimpleQueue()
        self._orders = orders
        self._patience = patience
        self._now = clock
        self._stuck = stuck
        self._lost = lost
        self._every = every_seconds
        self._retry = retry_seconds
        self._outstanding = 0
        self._saved_clock = 0
        self._seen = 0
        self._next_by_time = None if every_seconds is None else clock() + every_seconds
        self._retry_at: float | None = None
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="checkpoint-coordinator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self._decide()
        except Exception as error:  # noqa: BLE001  (the main thread raises it at the next update)
            self._lost(error)

    def _decide(self) -> None:
        while True:
            try:
                message = self.inbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                message = None
            match message:
                case Requested(clock):
                    self._requested(clock)
                case Done(saved, failed):
                    self._done(saved, failed)
                case Close():
                    self._orders.post(Order(Kind.CLOSE))
                    return
                case None:
                    pass
            if not self._ending:
                self._look_around()

    def _requested(self, clock: int) -> None:
        self._patience.due(self._now())
        if self._outstanding or self._ending:
            self._orders.post(Order(Kind.SKIP, clock))
        else:
            self._save(Order(Kind.SAVE, clock, "schedule"))

    def _save(self, order: Order) -> None:
        self._patience.due(self._now())
        self._outstanding += 1
        self._retry_at = None
        self._orders.post(order)

    def _done(self, saved: int | None, failed: bool) -> None:
        self._outstanding -= 1
        if saved is not None:
            self._saved_clock = saved
            self._patience.worked()
            if self._every is not None:
                self._next_by_time = self._now() + self._every
        elif failed and self._retry is not None:
            self._retry_at = self._now() + self._retry

    def _look_around(self) -> None:
        count, _, reason = self._orders.demands(Demand.TERMINATE)
        if count:
            self._ending = True
            self._save(Order(Kind.STOP, reason=reason))
            return
        now = self._now()
        if self._patience.exhausted(now):
            self._ending = True
            if self._outstanding:
                self._stuck()
            else:
                waited = self._patience.waited(now) / 60
                self._orders.post(Order(Kind.GIVE_UP, reason=f"{waited:.1f} minutes"))
        elif not self._outstanding:
            self._save_if_wanted(now)

    def _save_if_wanted(self, now: float) -> None:
        count, clock, reason = self._orders.demands(Demand.SAVE)
        if count > self._seen:
            self._seen = count
            # Signals come to many ranks for one save: one of a state as new as the sender's answers all.
            if clock > self._saved_clock:
                self._save(Order(Kind.HOLD, reason=reason))
        elif self._retry_at is not None and now >= self._retry_at:
            self._save(Order(Kind.HOLD, reason="retry"))
        elif self._next_by_time is not None and now >= self._next_by_time:
            assert self._every is not None
            self._next_by_time = now + self._every
            self._save(Order(Kind.HOLD, reason="time"))
