"""Saving while training goes on.

**The threads.** The main thread tells of updates; a saver thread on every rank copies and writes; on rank 0 a
coordinator decides; a watcher takes signals. Saver threads follow one numbered list of orders that rank 0
posts in the store, so that their collectives, all on a gloo group of their own, always meet. No group of
training is ever used.

**Which state.** State is constant between two updates (see `gate`), also in the middle of a step, and every
update lies behind a collective of all ranks (the gradients' norm). A rank that is in, or behind, update n + 1
thus proves that all are behind update n: at any moment the ranks' clocks differ by at most one.

- A *request* is made by all main threads after the same update. Each keeps that state until it is copied.
- Signals, the interval in minutes and retries come at any moment. The order HOLD makes every saver thread (1)
  close its rank's gate and take the clock that the rank reaches without another update: the present one, or
  one more if it is in an update now; (2) gather these and take the largest, V; (3) let its main thread make
  changes up to V, wait until it has, and copy.

**Why this cannot deadlock.** Steps 1 and 2 need only the saver threads. In step 3 a rank waits for its own
main thread alone, and only if that is one behind. A rank at V, or in update V, got there through the
collective before it; so the ranks behind have entered that collective, it completes, their gates let them
pass, and whatever the update itself communicates finds everybody there. Nobody needs a rank at V to go on. If
all are at V, no main thread takes part: it may sit in a collective or a pipeline for as long as it likes.

**When a rank dies in it**, its peers' saver threads wait in the gather until their connection to it breaks.
Then they report it and training refuses to go on; it could not have without that rank either. Should nothing
break, as with a frozen host, a stop is bounded by `grace_seconds` on every rank that knows of it, and any
other wait by the group's timeout.

**SIGTERM** on any rank: STOP, a HOLD after which the gate stays closed. When the copy is complete `stopping`
is true; the loop leaves at its next micro-batch, calls `close`, which waits for the commit, and ends with
`stop_status`, 143. A main thread that has not come `leave_seconds` after the commit is not waited for: the
process ends. SIGINT does the same, with 130. Told again `insist_seconds` later it ends at once. Not sooner: a
scheduler signals every process of a job and torchrun then signals its workers again, and the stop that
another rank was told of is here before this rank's own signal.

**A save that fails** fails for all ranks and becomes a finding; it is tried again after a while. When none
has worked for `give_up_after_minutes` since one was first due, all ranks agree on a state and `before_update`
raises `GaveUp` on all of them in the same step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ltf.checkpoint.coordinator import Close, Coordinator, Done, Requested
from ltf.checkpoint.findings import failed, gave_up, skipped
from ltf.checkpoint.gate import Boundary, Gate
from ltf.checkpoint.orders import Demand, Kind, Order, Orders
from ltf.checkpoint.patience import Patience
from ltf.checkpoint.peers import Failed, Peers
from ltf.checkpoint.pieces import Piece
from ltf.checkpoint.signals import Signals
from ltf.checkpoint.state import Buffers, State, changed, generators
from ltf.checkpoint.store import Store
from ltf.checkpoint.write import About, write
from ltf.config.schema import Checkpoint
from ltf.findings import Finding, Json, Severity

EXIT_STATUS = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
LEAVE_SECONDS = 5.0
INSIST_SECONDS = 5.0
RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint. `seconds`: from the copy's beginning to the commit. `size`: bytes."""

    version: int
    path: Path
    size: int
    seconds: float
    reason: str


class LeaveTraining(Exception):
    """No further update may be made. `status`: what the process should end with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Stopped(LeaveTraining):
    """The run was told to end, and its state is copied."""


class GaveUp(LeaveTraining):
    """No save has worked for too long."""


class Saver:
    """A run's checkpoints; all ranks make one, in the main thread, and call it alike.

    `config`, `about`: plain JSON that goes into every manifest. `saved`: the version just loaded, which need
    not be written again. `clock`: monotonic seconds. `on_exit`: called with the status before the process
    is ended without its main thread. With `signals`, SIGTERM, SIGINT and SIGUSR1 are taken over till `close`.
    """

    def __init__(
        self,
        store: Store,
        state: State,
        settings: Checkpoint,
        *,
        config: Mapping[str, Json],
        about: Mapping[str, Json] | None = None,
        device: torch.device | None = None,
        saved: int | None = None,
        signals: bool = True,
        clock: Callable[[], float] = time.monotonic,
        retry_seconds: float | None = RETRY_SECONDS,
        leave_seconds: float = LEAVE_SECONDS,
        insist_seconds: float = INSIST_SECONDS,
        on_exit: Callable[[int], None] = lambda status: None,
    ) -> None:
        patience = Patience(settings.give_up_after_minutes * 60)
        self.peers = Peers.join(patience.seconds + 60)
        self.store = store
        self._state = state
        self._settings = settings
        self._config = config
        self._about = {"ranks": self.peers.size, "torch": torch.__version__, **(about or {})}
        self._device = device or torch.device("cpu")
        self._saved_version = saved
        self._saved_clock: int | None = None
        self._on_exit = on_exit
        self._leave_seconds = leave_seconds
        self._insist_seconds = insist_seconds
        self._told_at = 0.0
        self.stop_status = EXIT_STATUS
        self._gate = Gate()
        self._buffers = Buffers(self._device)
        self._results: deque[Saved | Finding] = deque()
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._grace: threading.Timer | None = None
        self._grace_lock = threading.Lock()
        self._demands = Orders(self.peers.store)
        self._coordinator: Coordinator | None = None
        if self.peers.rank == 0:
            minutes = settings.every_minutes
            self._coordinator = Coordinator(
                Orders(self.peers.store),
                patience,
                clock,
                lambda: self._gate.refuse(GaveUp("a save hangs, and none has worked for too long", 1)),
                self._lost,
                every_seconds=None if minutes is None else minutes * 60,
                retry_seconds=retry_seconds,
            )
        self._thread = threading.Thread(target=self._serve, name="checkpoint-saver", daemon=True)
        self._sweep()
        self._thread.start()
        if self._coordinator is not None:
            self._coordinator.start()
        actions: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self.terminate,
            signal.SIGINT: lambda: self.terminate("SIGINT"),
            signal.SIGUSR1: self.save_soon,
        }
        self._signals = Signals(actions) if signals else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        failed_here = error is not None and not isinstance(error, LeaveTraining)
        self.close(abandon=failed_here)
        if failed_here and isinstance(error, Exception) and self.stopping:
            # A rank that has left breaks the collectives of those that still sat in one.
            raise Stopped("told to end while a step was under way", self.stop_status) from error

    # What the loop calls.

    def before_update(self) -> float:
        """Before any change of parameters or optimizer state: wait until a save has its copy; seconds waited.

        LeaveTraining if no change may be made any more.
        """
        return self._gate.enter()

    def finished_update(self, version: int, progress: Mapping[str, Json]) -> None:
        """State and `progress` (given away) are those after `version` steps; also once before the first step.

        Also after a step that changed nothing, and, between `before_update` and this, after a roll-back. The
        random number generators are read here.
        """
        boundary = Boundary(
            0, version, progress, generators(self.peers.rank, self._device), changed(self._device)
        )
        if self._gate.clock == 0 and version == self._saved_version:
            self._saved_clock = 1
        self._gate.leave(boundary)

    def request(self) -> float:
        """Save the present state; all ranks ask after the same update. Returns the seconds that it took.

        At once in the background: the copy is made during the next step, and `before_update` waits for it.
        """
        start = time.monotonic()
        boundary = self._gate.request()
        if self._coordinator is not None:
            self._coordinator.inbox.put(Requested(boundary.clock))
        if not self._settings.background:
            self._gate.wait_answered()
        return time.monotonic() - start

    def save_soon(self, reason: str = "SIGUSR1") -> None:
        """Save whatever state the ranks agree on; any rank, any thread, any moment."""
        self._ask(Demand.SAVE, reason)

    def terminate(self, reason: str = "SIGTERM") -> None:
        """Save and end, as on SIGTERM; one more call `insist_seconds` later ends the process at once."""
        if not self._start_grace(reason):
            if time.monotonic() - self._told_at >= self._insist_seconds:
                os._exit(self.stop_status)
            return
        self._ask(Demand.TERMINATE, reason)

    @property
    def stopping(self) -> bool:
        """The last state is copied: leave at the next micro-batch, close, and end with `stop_status`."""
        return self._stopping.is_set()

    def poll(self) -> list[Saved | Finding]:
        """What has happened since the last call; the same on all ranks, though not at the same moment."""
        found = []
        while self._results:
            found.append(self._results.popleft())
        return found

    def wait(self) -> None:
        """Until every request so far has become durable or failed."""
        self._gate.wait_answered()

    def close(self, *, abandon: bool = False) -> None:
        """Finish what is being saved and end the threads; all ranks call it.

        `abandon`: this rank failed and the others may never come, so nothing but a stop in progress is waited
        for.
        """
        self._closing.set()
        if self._coordinator is not None and not abandon:
            self._coordinator.inbox.put(Close())
        if not abandon or self._grace is not None:
            self._thread.join()
            if self._grace is not None:
                self._grace.cancel()
        if self._signals is not None:
            self._signals.close()
            self._signals = None

    def _ask(self, what: Demand, reason: str) -> None:
        try:
            self._demands.demand(what, self._gate.clock, reason)
        except RuntimeError as error:
            self._lost(error)

    # The saver thread.

    def _serve(self) -> None:
        try:
            if self._device.type != "cpu":
                torch.accelerator.set_device_index(self._device)
            orders = Orders(self.peers.store)
            while self._obey(orders.next()):
                pass
        except Exception as error:  # noqa: BLE001  (the main thread raises it at the next update)
            self._lost(error)
        finally:
            self._ended.set()
            # A main thread that still trains must not wait for a copy that nobody makes.
            self._gate.refuse(LeaveTraining("saving has ended", 1))

    def _obey(self, order: Order) -> bool:
        """False after the last one."""
        match order.kind:
            case Kind.SAVE:
                boundary = self._gate.requested(order.clock)
                self._save(order, boundary, lambda: self._gate.copied(order.clock))
                self._gate.answer(order.clock)
            case Kind.SKIP:
                boundary = self._gate.requested(order.clock)
                self._tell(skipped(boundary.version))
                self._gate.copied(order.clock)
                self._gate.answer(order.clock)
            case Kind.HOLD:
                self._save(order, self._hold(), self._gate.release)
            case Kind.STOP:
                self._start_grace(order.reason)
                self._save(order, self._hold(), lambda: self._stop(order.reason))
                if not self._closing.wait(self._leave_seconds):
                    self._leave()
                return False
            case Kind.GIVE_UP:
                boundary = self._hold()
                finding = gave_up(boundary.version, order.reason, self._settings.give_up_after_minutes)
                self._tell(finding)
                self._gate.refuse(GaveUp(finding.message, 1))
            case Kind.CLOSE:
                # This rank may still be in its last update. Then all together: rank 0 hosts the store.
                self._closing.wait()
                self.peers.gather(None)
                return False
        return True

    def _hold(self) -> Boundary:
        return self._gate.allow(max(self.peers.gather(self._gate.hold())))

    def _stop(self, reason: str) -> None:
        self._stopping.set()
        self._gate.refuse(Stopped(f"told to end by {reason}", self.stop_status))

    def _save(self, order: Order, boundary: Boundary, release: Callable[[], None]) -> None:
        """`release` is called as soon as the state may change again, whatever happens."""
        start = time.monotonic()
        if boundary.clock == self._saved_clock:
            release()
            self._report_done(Done(saved=boundary.clock))
            return
        copies: list[Piece] = []
        try:
            self.peers.agree(lambda: copies.extend(self._copy(boundary, release)))
            about = About(boundary.version, boundary.progress, self._config, self._about)
            manifest = write(self.store, self.peers, copies, about, order.nonce)
        except Failed as failure:
            self._tell(failed(boundary.version, failure, order.reason))
            self._report_done(Done(failed=True))
            return
        self._saved_clock, self._saved_version = boundary.clock, boundary.version
        path = self.store.path_of(boundary.version)
        seconds = time.monotonic() - start
        self._tell(Saved(boundary.version, path, manifest.size, seconds, order.reason))
        self._report_done(Done(saved=boundary.clock))
        if order.kind is not Kind.STOP:
            self._retain(boundary.version)

    def _copy(self, boundary: Boundary, release: Callable[[], None]) -> list[Piece]:
        try:
            return self._buffers.copy(self._state.pieces(), boundary.ready) + boundary.generators
        finally:
            release()

    def _retain(self, version: int) -> None:
        def delete() -> None:
            if self.peers.rank == 0:
                self.store.retain(self._settings.keep_last, self._settings.keep_every)

        try:
            self.peers.agree(delete, self.store.root)
        except Failed as failure:
            message = f"old checkpoints could not be deleted: {failure}"
            self._tell(Finding("checkpoint.retention", Severity.WARNING, version, message))

    def _sweep(self) -> None:
        def sweep() -> None:
            if self.peers.rank == 0:
                self.store.sweep()

        try:
            self.peers.agree(sweep, self.store.root)
        except Failed as failure:
            message = f"what dead processes left could not be removed: {failure}"
            self._tell(Finding("checkpoint.leftovers", Severity.WARNING, self._saved_version or 0, message))

    def _tell(self, what: Saved | Finding) -> None:
        self._results.append(what)

    def _report_done(self, done: Done) -> None:
        if self._coordinator is not None:
            self._coordinator.inbox.put(done)

    def _lost(self, error: Exception) -> None:
        message = f"saving ended on rank {self.peers.rank}: {type(error).__name__}: {error}"
        step = 0 if self._saved_version is None else self._saved_version
        self._tell(Finding("checkpoint.lost", Severity.ERROR, step, message, (self.peers.rank,)))
        self._gate.release()
        self._gate.refuse(LeaveTraining(message, 1))

    # The end of the process.

    def _start_grace(self, reason: str) -> bool:
        """False if it runs already."""
        with self._grace_lock:
            if self._grace is not None:
                return False
            self.stop_status = INTERRUPTED if reason == "SIGINT" else EXIT_STATUS
            self._told_at = time.monotonic()
            self._grace = threading.Timer(self._settings.grace_seconds, self._leave)
            self._grace.daemon = True
            self._grace.start()
            return True

    def _leave(self) -> None:
        self._on_exit(self.stop_status)
        os._exit(self.stop_status)
